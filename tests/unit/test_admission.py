"""An admission waits for no copy to the device. A device that holds nothing stands in."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eaglerun.kernels.rows import BySlot
from eaglerun.messages import SamplingParams
from eaglerun.plan.step import Admission, BlockUpdate
from eaglerun.run.state import DeviceState
from eaglerun.sampling import SamplingState
from eaglerun.speculative.verify import Script

META = torch.device("meta")
ALL = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    top_k=5,
    min_p=0.01,
    repetition_penalty=1.25,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    logit_bias={3: 1.0, 7: -2.0},
    min_tokens=4,
    stop_token_ids=(9, 11),
    seed=1,
)


class Copies(TorchDispatchMode):
    """Whether each copy from the host to the device lets the host go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if name == "aten::_to_copy" and args[0].device.type == "cpu" and result.is_meta:
            self.found.append(bool(kwargs.get("non_blocking")))
        if name == "aten::copy_" and args[0].is_meta and args[1].device.type == "cpu":
            self.found.append(bool((*args, *[False] * 3)[2] or kwargs.get("non_blocking")))
        return result


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    tensor = torch.tensor
    with Copies() as found:

        def made(*args, **kwargs):
            # Made on the host and copied, where no mode sees it.
            if kwargs.get("device") == META:
                found.found.append(False)
            return tensor(*args, **kwargs)

        monkeypatch.setattr(torch, "tensor", made)
        yield found


def test_the_watch_sees_a_copy_that_waits(copies: Copies):
    torch.tensor([1, 2]).to(META)
    torch.zeros(2, device=META)[:1] = torch.ones(1)
    torch.tensor([1, 2]).to(META, non_blocking=True)
    torch.tensor([1, 2], device=META)
    assert copies.found == [False, False, True, False]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), ALL], ids=["greedy", "all"])
def test_an_admission_waits_for_no_copy(params: SamplingParams, copies: Copies):
    state = DeviceState(3, 4, 2, vocab_size=40, max_stop_ids=8, device=META)
    script = Script(4, 16, 40, META)
    admission = Admission(1, params, 5, (1, 2, 39), (3, 3), 2, -1)
    state.admit(admission, (0,))
    state.set_blocks(BlockUpdate(1, 1, (5, 6)))
    script.admit(admission)
    assert len(copies.found) > 3 and all(copies.found)


def test_an_admission_sets_its_own_slot_alone():
    state = SamplingState(3, 40, 8, torch.device("cpu"))
    before = {name: t.clone() for name, t in vars(state).items() if isinstance(t, Tensor)}
    state.admit(1, ALL, -5, (9, 11), (1, 2, 39), (3, 3), 2)
    floats = (state.temperature, state.top_p, state.min_p, state.repetition_penalty)
    floats += (state.presence_penalty, state.frequency_penalty)
    integers = (state.top_k, state.seed, state.min_tokens, state.num_generated)
    wish = torch.tensor([0.7, 0.9, 0.01, 1.25, 0.5, -0.5])
    assert torch.equal(torch.stack(floats)[:, 1], wish)
    assert torch.stack(integers)[:, 1].tolist() == [5, -5, 4, 2]
    assert state.bias_ids[1, :3].tolist() == [3, 7, -1]
    assert state.bias_values[1, :2].tolist() == [1.0, -2.0]
    assert state.stop_ids[1].tolist() == [9, 11, *[-1] * 6]
    assert state.output_counts[1].nonzero().tolist() == [[3]] and state.output_counts[1, 3] == 2
    bits = [(int(word) >> i) & 1 for word in state.prompt_bits[1] for i in range(32)]
    assert [i for i, bit in enumerate(bits) if bit] == [1, 2, 39]
    state.admit(1, replace(ALL, logit_bias={}), 0, (), (), (), 0)
    assert state.bias_ids[1].tolist() == [-1] * 300
    for name, tensor in before.items():
        now = vars(state)[name]
        rows = now.movedim(-1, 0) if name in ("_floats", "_integers") else now
        old = tensor.movedim(-1, 0) if name in ("_floats", "_integers") else tensor
        assert torch.equal(rows[[0, 2, 3]], old[[0, 2, 3]]), name


def test_the_state_by_slot_is_the_state():
    state = DeviceState(2, 3, 1, vocab_size=8, max_stop_ids=1, device=torch.device("cpu"))
    assert isinstance(state.by_slot, BySlot)
    state.set_blocks(BlockUpdate(1, 1, (5, 6)))
    assert state.by_slot.block_table.tolist() == [[0, 0, 0], [0, 5, 6], [0, 0, 0]]
    assert state.by_slot.length.data_ptr() == state.length.data_ptr()
