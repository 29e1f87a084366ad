"""eaglerun warm: compile a server's kernels ahead, for an image or another machine."""

import time

import torch

from eaglerun.config import Config
from eaglerun.errors import ConfigError
from eaglerun.kernels.language import INSTALLED
from eaglerun.kernels.launch import TABLE, arch_of
from eaglerun.loader import check_device, choose_device, choose_dtype, read_checkpoints
from eaglerun.progress import steps_bar, tick
from eaglerun.ranks.kernels import KernelCache, compile_all
from eaglerun.ranks.local import launched_by


def compile_kernels(config: Config, arch: str | None) -> str:
    """Compile all kernels that a server with these settings launches on ``arch`` (None: on the GPU
    here) into its cache, and tell what was done. Only the checkpoints' config.json are read.

    For a process that launches nothing afterwards.

    Raises  ConfigError on an unknown ``arch``, none where there is no GPU, and kernels that do not
    compile.
    """
    if arch is None:
        device = choose_device("auto")
        if device.type != "cuda":
            raise ConfigError(f"arch: there is no GPU here; allowed {', '.join(TABLE)}")
        check_device(device)
        arch = arch_of(device)
    elif arch not in TABLE:
        raise ConfigError(f"arch = {arch!r}: allowed {', '.join(TABLE)}")
    if not INSTALLED:
        raise ConfigError("warm: kernels need triton, which is not installed")
    found, begin = read_checkpoints(config), time.perf_counter()
    dtype = choose_dtype(config.model.dtype, found.target.dtype, torch.device("cuda"))
    launched = launched_by(config, found.target, found.draft, dtype, arch)
    cache = KernelCache.of(config)
    programs, done = cache.read(launched), "were compiled before"
    if programs is None:
        with steps_bar(None, "compiling", "kernels") as bar:

            def told(known: int, name: str, is_new: bool) -> None:
                bar.total = known
                tick(bar, name)

            failed = compile_all(cache, launched, told)
        programs, done = cache.read(launched), "compiled"
        if failed or programs is None:
            raise ConfigError(f"{len(failed)} kernels do not compile: {'; '.join(failed[:3])}")
    return (
        f"{len(programs)} kernels for {arch} {done} in {time.perf_counter() - begin:.1f} s; "
        f"{cache.directory} holds {cache.num_bytes() / 2**20:.0f} MiB"
    )
