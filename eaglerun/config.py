"""Config: every setting, decided once.

A field is set by a flag (``--max-num-seqs 8``), else by the environment (EAGLERUN_MAX_NUM_SEQS),
else by a TOML file (``[scheduling]`` ``max_num_seqs = 8``), else by its default here. resolve() is
the only reader of the environment; after it nothing decides again.
"""

import dataclasses
import difflib
import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from eaglerun.errors import ConfigError
from eaglerun.messages import MAX_DRAFT_TOKENS

ENV_PREFIX = "EAGLERUN_"
# How alike (difflib) a variable and a setting are when one is taken for the other misspelled.
SLIP = 0.85
# KV memory on the CPU, where nobody asks for another: enough for the demo pair.
CPU_KV_GIB = 1.0


def option(
    default: object,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """A Config field. ``low`` and ``high`` are the allowed ends; aliases are further flag names,
    of which one that begins with a dash is the whole flag."""
    metadata = {
        "help": help,
        "choices": choices,
        "low": low,
        "high": high,
        "aliases": aliases,
        "secret": secret,
    }
    return field(default=default, metadata=metadata)


def _kinds(hint: object) -> tuple[type, ...]:
    """The plain types that a field's annotation allows."""
    if isinstance(hint, UnionType):
        return tuple(k for arg in get_args(hint) for k in _kinds(arg))
    origin = get_origin(hint)
    kind = hint if origin is None else origin
    assert isinstance(kind, type)
    return (kind,)


def _check_field(f: "dataclasses.Field[Any]", hint: object, value: Any) -> None:
    kinds = _kinds(hint)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    ok = isinstance(value, kinds) or (float in kinds and number)
    if isinstance(value, bool) and bool not in kinds:
        ok = False
    if not ok:
        wanted = " or ".join("none" if k is type(None) else k.__name__ for k in kinds)
        raise ConfigError(f"{f.name} = {value!r}: expected {wanted}")
    if number and not math.isfinite(value):
        raise ConfigError(f"{f.name} = {value!r}: expected a finite number")
    if isinstance(value, tuple):
        for item in value:
            if not isinstance(item, int) or isinstance(item, bool) or item < 0:
                raise ConfigError(f"{f.name} = {value!r}: {item!r} is not a whole number >= 0")
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise ConfigError(f"{f.name} = {value!r}: allowed {', '.join(f.metadata['choices'])}")
    low, high = f.metadata["low"], f.metadata["high"]
    if number and ((low is not None and value < low) or (high is not None and value > high)):
        allowed = f"{low:g} to {high:g}" if high is not None else f"at least {low:g}"
        raise ConfigError(f"{f.name} = {value!r}: allowed {allowed}")


class Checked:
    """Checks every field of a frozen section against its declared type and range."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in self.__dataclass_fields__.values():
            _check_field(f, hints[f.name], getattr(self, f.name))


@dataclass(frozen=True, slots=True)
class ModelConfig(Checked):
    """[model]: which checkpoints, and in which form they are held."""

    model: str = option("demo", "target: a local directory, a hub id, or 'demo', the bundled pair")
    draft: str | None = option(
        None,
        "EAGLE3 draft: a local directory or a hub id; none: plain decoding",
        aliases=("draft-model", "spec-model", "speculative-draft-model-path"),
    )
    load_format: str = option(
        "auto",
        "auto reads the checkpoint, dummy makes seeded random weights",
        choices=("auto", "dummy"),
    )
    dtype: str = option(
        "auto",
        "type of weights and activations; auto: the checkpoint's on a GPU, float32 on the CPU",
        choices=("auto", "bfloat16", "float16", "float32", "float64"),
    )
    device: str = option(
        "auto", "where to run; auto: the GPU if there is one", choices=("auto", "cpu", "cuda")
    )
    tensor_parallel_size: int = option(
        1,
        "GPUs that divide both models, a process each; only check-config takes more than 1 yet",
        low=1,
        aliases=("tp-size", "-tp"),
    )
    cpu_threads: int | None = option(
        None,
        "threads that compute on the CPU; none: one for each 64 MiB of weights, at most the cores",
        low=1,
    )
    max_model_len: int | None = option(
        None,
        "longest prompt + output in tokens; none: the checkpoint's, or what the KV memory holds",
        low=2,
        aliases=("context-length",),
    )
    seed: int = option(0, "seed of dummy weights and of requests that bring none")
    served_model_name: str | None = option(None, "name in the API; none: the model's own")
    use_index_cache: bool = option(
        False, "share block selections between sparse layers (an approximation of the model)"
    )
    index_topk_freq: int = option(1, "with use_index_cache: every n-th sparse layer selects", low=1)
    index_skip_topk_offset: int = option(
        0, "with use_index_cache: first layer that may share", low=0
    )
    index_topk_pattern: str | None = option(
        None, "with use_index_cache: one letter a sparse layer, S = shares"
    )


@dataclass(frozen=True, slots=True)
class CacheConfig(Checked):
    """[cache]: KV memory."""

    block_size: int | None = option(
        None,
        "tokens of a KV block; none: the sparse attention's block, the only one allowed",
        low=1,
    )
    num_kv_blocks: int | None = option(
        None, "KV blocks; none: as many as kv_cache_gib holds", low=1
    )
    kv_cache_gib: float | None = option(
        None,
        "KV memory, GiB; none: what gpu_memory_utilization leaves on a GPU, 1 on the CPU",
        low=0.001,
    )
    gpu_memory_utilization: float = option(
        0.9,
        "share of the GPU's memory that may be in use once started, other processes' included; "
        "what the models and a step need is measured, the rest becomes KV blocks",
        low=0.01,
        high=1,
    )
    kv_cache_dtype: str = option(
        "auto",
        "type of K and V in memory, target's and draft's; auto: the models'; fp8: e4m3fn, scale 1",
        choices=("auto", "bfloat16", "fp8"),
    )
    index_cache_dtype: str = option(
        "auto",
        "type of the indexer's keys in memory; auto: the models'; fp8: e4m3fn, scale 1",
        choices=("auto", "bfloat16", "fp8"),
    )
    enable_prefix_caching: bool = option(True, "reuse the KV of equal prompt beginnings")

    @property
    def sized(self) -> bool:
        """Whether the settings alone say how much KV memory there is."""
        return self.num_kv_blocks is not None or self.kv_cache_gib is not None


@dataclass(frozen=True, slots=True)
class SchedulingConfig(Checked):
    """[scheduling]: how much runs at once."""

    max_num_seqs: int = option(
        32, "sequences that run at once", low=1, high=4096, aliases=("max-running-requests",)
    )
    max_num_batched_tokens: int = option(
        2048, "rows of a step: decode rows first, prefill takes the rest", low=1
    )
    max_chunk_tokens: int | None = option(
        None, "rows of one prefill chunk; none: max_num_batched_tokens", low=1
    )
    max_itl_ms: float | None = option(
        None,
        "milliseconds that running streams wait for their next tokens while prompts are read: "
        "prefill beside them is cut to keep it; a bound below a decode step and 128 rows of "
        "prefill cannot be kept; none: any",
        low=0.001,
    )
    lag: int | None = option(
        None, "steps the host plans ahead of the device; none: 1 on a GPU, else 0", low=0, high=1
    )
    decode_batch_sizes: tuple[int, ...] = option(
        (),
        "pad the decode batch to the next of these sizes; empty: a few sizes on a GPU, where each "
        "is captured, else no padding",
    )
    enforce_eager: bool = option(False, "on a GPU: launch every kernel anew, capture no graphs")
    warmup: str = option(
        "common",
        "on a GPU, what a server has ready before its first request; full: all kernels, and graphs "
        "of the decode steps with any number of drafts; common: all kernels, and graphs of those "
        "with all drafts; other steps are captured while nobody waits; none: each kernel and graph "
        "is made where a step first needs it",
        choices=("full", "common", "none"),
    )
    kernel_cache_dir: str | None = option(
        None,
        "where compiled kernels are kept from start to start; none: Triton's cache directory, "
        "TRITON_CACHE_DIR or ~/.triton/cache",
    )
    overlap_kernels: bool = option(
        True, "on a Hopper GPU: let a kernel start while the one before it ends"
    )
    batch_invariant: bool = option(
        False,
        "on a Hopper GPU, in bfloat16: a token's logits do not depend, to the bit, on the rows "
        "computed beside it, nor on K; slightly slower",
        aliases=("enable-deterministic-inference",),
    )


@dataclass(frozen=True, slots=True)
class SpeculationConfig(Checked):
    """[speculation]: how drafts are made and judged."""

    num_draft_tokens: int = option(
        3,
        "tokens drafted per step (K); 0: plain decoding",
        low=0,
        high=MAX_DRAFT_TOKENS,
        aliases=("num-speculative-tokens", "spec-tokens", "speculative-num-steps"),
    )
    verification: str = option(
        "invariant",
        "invariant: same seed, same output as without the draft; rejection: the classic sampler, "
        "same distribution, but a seed's output depends on K",
        choices=("invariant", "rejection"),
    )
    draft_sampling: str = option(
        "greedy",
        "greedy: the draft's best token; probabilistic: drawn from its distribution",
        choices=("greedy", "probabilistic"),
    )
    synthetic_acceptance_length: float | None = option(
        None,
        "benchmarks only: force this mean acceptance length; the text means nothing",
        low=1,
        aliases=("spec-decode-acceptance-length",),
    )
    synthetic_acceptance_rate: float | None = option(
        None,
        "benchmarks only: the same as accepted / drafted",
        low=0,
        high=1,
        aliases=("spec-decode-acceptance-rate",),
    )

    scripted: str = option(
        "none",
        "benchmarks and tests only: drafts, or all tokens, come from a seeded script and not from "
        "the models; with tokens the text means nothing",
        choices=("none", "drafts", "tokens"),
    )


@dataclass(frozen=True, slots=True)
class OutputConfig(Checked):
    """[output]: what is reported."""

    logprobs_mode: str = option(
        "raw",
        "log-probabilities of the model's own logits, or after penalties and filters",
        choices=("raw", "processed"),
    )
    return_aux_hidden_states: bool = option(
        False, "keep the captured hidden states of every token (tests, draft training)"
    )
    aux_layers: tuple[int, ...] = option(
        (), "without a draft: layers whose entering hidden states are captured, as 2,30,57"
    )
    log_stats_every: int = option(
        3000, "drafted tokens between two acceptance log lines; 0: none", low=0
    )


@dataclass(frozen=True, slots=True)
class ServerConfig(Checked):
    """[server]: who may ask, how much may wait, and how it ends."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all of IPv4")
    # Not "port": Kubernetes sets EAGLERUN_PORT=tcp://... for a service named eaglerun.
    http_port: int = option(
        8000, "port to listen on; 0: a free one", low=0, high=65535, aliases=("port",)
    )
    api_key: str | None = option(
        None, "keys that clients must send, separated by commas; none: open", secret=True
    )
    allow_no_api_key: bool = option(
        False, "listen on other than loopback addresses even without an api_key"
    )
    allow_priority: str | None = option(
        None,
        "keys whose requests may set priority, separated by commas; all: every client's; none: "
        "nobody's",
        secret=True,
    )
    prefix_cache_scope: str = option(
        "key",
        "who shares cached prompts: requests of the same api_key, or all of them, which lets one "
        "client learn by time and by cached_tokens what another asked",
        choices=("key", "all"),
    )
    ssl_certfile: str | None = option(None, "TLS certificate chain (PEM); none: plain HTTP")
    ssl_keyfile: str | None = option(None, "TLS key (PEM); none: in ssl_certfile")
    cors_origins: str | None = option(
        None,
        "origins whose pages may call this server, separated by commas; *: any",
        aliases=("allowed-origins",),
    )
    allowed_hosts: str | None = option(
        None,
        "names in the Host header that are answered, separated by commas; *: any; none: loopback "
        "names where the server is local and has no api_key, else any",
    )
    forwarded_allow_ips: str | None = option(
        None,
        "addresses of proxies whose X-Forwarded-For is believed, separated by commas; none: nobody",
    )
    max_connections: int | None = option(
        None, "connections at once; none: 4096, or what the limit of open files leaves", low=1
    )
    max_connections_per_address: int | None = option(
        None, "of those from one address (proxies excepted); none: half of them", low=1
    )
    header_timeout: float = option(
        10.0, "seconds from a connection's start to the end of its headers", low=0.001
    )
    write_timeout: float = option(
        60.0, "seconds that a client may take no bytes of its answer; then it is cut off", low=0.001
    )
    chat_template: str | None = option(None, "Jinja file; none: the checkpoint's own")
    chat_template_kwargs: str = option(
        "thinking_mode", "names that requests may set in chat_template_kwargs, by commas"
    )
    max_queued_requests: int = option(
        1024, "answers without their first token; more are refused with 503", low=1
    )
    max_queued_tokens: int = option(
        4_194_304, "prompt tokens of requests that wait; a lone one may exceed it", low=1
    )
    queue_timeout: float = option(
        600.0, "seconds a request may wait for its first token; then it is refused", low=0.001
    )
    rate_limit: float | None = option(
        None, "requests a second for each API key (address, without keys); none: any", low=0.001
    )
    rate_limit_burst: int = option(32, "requests above that rate at once", low=1)
    max_body_bytes: int = option(16 * 2**20, "largest body of a request", low=1024)
    max_prompt_chars: int = option(8 * 2**20, "longest prompt after the chat template", low=1)
    max_n: int = option(16, "answers to one request", low=1, high=128)
    max_stop: int = option(16, "stop strings of one request", low=0)
    hung_after: float = option(
        30.0, "seconds without a step, while requests are open, until not ready", low=0.001
    )
    shutdown_timeout: float = option(
        30.0, "seconds that open requests get to end after SIGTERM", low=0
    )
    log_level: str = option(
        "info", "least important log lines shown", choices=("debug", "info", "warning", "error")
    )
    log_stats_interval: float = option(
        10.0, "seconds between log lines on throughput while there is any; 0: none", low=0
    )
    log_requests: bool = option(False, "log every HTTP request")
    log_prompts: bool = option(False, "log prompts and answers, which are private")


@dataclass(frozen=True, slots=True)
class Config:
    """The whole tree, one section per concern."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduling: SchedulingConfig = SchedulingConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    output: OutputConfig = OutputConfig()
    server: ServerConfig = ServerConfig()

    def __post_init__(self) -> None:
        spec, sched = self.speculation, self.scheduling
        if None not in (spec.synthetic_acceptance_length, spec.synthetic_acceptance_rate):
            raise ConfigError(
                f"synthetic_acceptance_length = {spec.synthetic_acceptance_length} and "
                f"synthetic_acceptance_rate = {spec.synthetic_acceptance_rate}: give one of the two"
            )
        length, k = self.synthetic_length, self.num_draft_tokens
        if length is not None and k == 0:
            raise ConfigError(
                f"synthetic acceptance needs a draft and num_draft_tokens >= 1; draft = "
                f"{self.model.draft}, num_draft_tokens = {spec.num_draft_tokens}"
            )
        if length is not None and not 1 <= length <= k + 1:
            raise ConfigError(
                f"synthetic_acceptance_length = {length}: allowed 1 to {k + 1} "
                "(num_draft_tokens + 1)"
            )
        if spec.scripted != "none" and spec.draft_sampling != "greedy":
            raise ConfigError(
                f"scripted = {spec.scripted!r} with draft_sampling = {spec.draft_sampling!r}: "
                "scripted drafts come from no distribution; allowed greedy"
            )
        if sched.batch_invariant and spec.verification != "invariant":
            raise ConfigError(
                f"batch_invariant = True with verification = {spec.verification!r}: the draft's "
                "numbers then decide what is accepted; allowed invariant"
            )
        rows = sched.max_num_seqs * (self.num_draft_tokens + 1)
        if sched.max_num_batched_tokens <= rows:
            raise ConfigError(
                f"max_num_batched_tokens = {sched.max_num_batched_tokens}: must exceed "
                f"max_num_seqs x (num_draft_tokens + 1) = {rows}, or prefill would starve"
            )

    @property
    def num_draft_tokens(self) -> int:
        """K_max in effect: 0 without a draft."""
        return 0 if self.model.draft is None else self.speculation.num_draft_tokens

    @property
    def meaningless_text(self) -> bool:
        """Whether a benchmark setting makes the output something else than the model's."""
        return self.synthetic_length is not None or self.speculation.scripted == "tokens"

    @property
    def synthetic_length(self) -> float | None:
        spec = self.speculation
        if spec.synthetic_acceptance_rate is not None:
            return 1.0 + spec.num_draft_tokens * spec.synthetic_acceptance_rate
        return spec.synthetic_acceptance_length

    def longest(self, limit: int) -> int:
        """The longest sequence that is asked for, or else the checkpoint's ``limit``. ConfigError
        where more is asked for than that."""
        wish = self.model.max_model_len
        if wish is not None and wish > limit:
            raise ConfigError(f"max_model_len = {wish}: the checkpoint allows at most {limit}")
        return wish or limit

    def check_one_rank(self) -> None:
        """ConfigError where an engine of several ranks is asked for, which there is none of yet."""
        size = self.model.tensor_parallel_size
        if size > 1:
            raise ConfigError(
                f"tensor_parallel_size = {size}: allowed 1, as no engine runs on several GPUs yet; "
                f"eaglerun check-config -tp {size} tells what each of them would hold"
            )

    def to_toml(self) -> str:
        """The effective values as a TOML file that resolve() reads back; secrets are masked."""
        lines = []
        for section in dataclasses.fields(self):
            lines.append(f"[{section.name}]")
            values = getattr(self, section.name)
            for f in dataclasses.fields(values):
                value = getattr(values, f.name)
                if value is None:
                    lines.append(f'{f.name} = "none"')
                elif f.metadata["secret"]:
                    lines.append(f"# {f.name}: set")
                else:
                    shown = list(value) if isinstance(value, tuple) else value
                    lines.append(f"{f.name} = {json.dumps(shown)}")
            lines.append("")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Option:
    """One field of the tree, for a command line: its section, name, type and metadata."""

    section: str
    name: str
    type: Any
    default: object
    help: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        names = (self.name.replace("_", "-"), *self.aliases)
        return tuple(name if name.startswith("-") else f"--{name}" for name in names)


def options() -> tuple[Option, ...]:
    """Every field of every section; names are unique over the tree."""
    found = []
    for section, kind in get_type_hints(Config).items():
        hints = get_type_hints(kind)
        for f in dataclasses.fields(kind):
            found.append(
                Option(
                    section,
                    f.name,
                    hints[f.name],
                    f.default,
                    f.metadata["help"],
                    f.metadata["choices"],
                    f.metadata["aliases"],
                )
            )
    return tuple(found)


def resolve(
    overrides: Mapping[str, object] | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Flags and keyword arguments (by field name), then environment, then file, then defaults.

    Strings are parsed by the field's type. ConfigError names an unknown key and the nearest one; a
    variable is refused only where it looks like a slip, for others put EAGLERUN_... there too.
    """
    environ = os.environ if environ is None else environ
    known = {o.name: o for o in options()}
    values: dict[str, object] = {}
    if file is not None:
        values |= _read_toml(file, known)
    for variable, text in environ.items():
        name = variable.removeprefix(ENV_PREFIX).lower()
        if variable != ENV_PREFIX + name.upper():
            continue
        if name in known:
            values[name] = parse(known[name], text)
        elif close := difflib.get_close_matches(name, known, 1, cutoff=SLIP):
            raise ConfigError(
                f"unknown variable {variable}; did you mean {ENV_PREFIX}{close[0].upper()}?"
            )
    for name, value in (overrides or {}).items():
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}{nearest(name, known)}")
        values[name] = parse(known[name], value) if isinstance(value, str) else value
    if values.get("model", "demo") == "demo":
        # The bundled target comes with its draft; num_draft_tokens = 0 runs it plain.
        values.setdefault("draft", "demo")
    sections: dict[str, dict[str, object]] = {}
    for name, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        sections.setdefault(known[name].section, {})[name] = value
    kinds = get_type_hints(Config)
    return Config(**{name: kinds[name](**given) for name, given in sections.items()})


def parse(option: Option, text: str) -> object:
    """A flag's or variable's text as the field's type; ConfigError says what was expected."""
    kinds = _kinds(option.type)
    if type(None) in kinds and text.lower() in ("none", ""):
        return None
    try:
        if bool in kinds:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if int in kinds:
            return int(text)
        if float in kinds:
            return float(text)
        if tuple in kinds:
            return tuple(int(part) for part in text.split(",") if part.strip())
    except (ValueError, KeyError):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise ConfigError(f"{option.name} = {text!r}: expected {wanted}") from None
    return text


def nearest(name: str, known: Mapping[str, object]) -> str:
    """'; did you mean ...?', or nothing."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _read_toml(file: Path, known: dict[str, Option]) -> dict[str, object]:
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {file} does not exist") from None
    except OSError as error:
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"config file {file} is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {file} is not UTF-8: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file {file} is not TOML: {error}") from None
    values: dict[str, object] = {}
    for section, table in tree.items():
        if section not in get_type_hints(Config) or not isinstance(table, dict):
            sections = dict.fromkeys(get_type_hints(Config))
            raise ConfigError(f"{file}: unknown section [{section}]{nearest(section, sections)}")
        for name, value in table.items():
            if name not in known or known[name].section != section:
                raise ConfigError(f"{file}: unknown key {section}.{name}{nearest(name, known)}")
            optional = type(None) in _kinds(known[name].type)
            values[name] = None if value == "none" and optional else value
    return values
