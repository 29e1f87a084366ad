"""Who waits, and who goes first."""

from eaglerun.messages import Request, SamplingParams
from eaglerun.plan.queue import Queue
from eaglerun.plan.sequence import Sequence, Status


def seq(name: str, arrival: int, priority: int = 0, index: int = 0) -> Sequence:
    request = Request(name, (1, 2, 3), SamplingParams(), priority)
    return Sequence(request, index, 0, arrival, None)


def names(queue: Queue) -> list[str]:
    found = []
    while (best := queue.pop()) is not None:
        found.append(f"{best.request.request_id}{best.index}")
    return found


def test_priority_goes_before_arrival_and_arrival_before_index():
    queue = Queue()
    for waiting in (seq("a", 0, 1), seq("b", 2), seq("c", 1, index=1), seq("c", 1)):
        queue.add(waiting)
    assert len(queue) == 4 and len(list(queue)) == 4
    assert names(queue) == ["c0", "c1", "b0", "a0"]
    assert queue.pop() is None


def test_a_preempted_sequence_returns_to_its_place():
    queue, first, second = Queue(), seq("a", 0), seq("b", 1)
    queue.add(first)
    queue.add(second)
    assert queue.pop() is first
    queue.add(first)
    assert names(queue) == ["a0", "b0"]


def test_siblings_wait_for_the_first_answers_prompt_and_hold_nobody_up():
    queue, leader = Queue(), seq("a", 0)
    sibling = seq("a", 0, index=1)
    sibling.leader = leader
    queue.add(sibling)
    queue.add(seq("b", 1))
    assert names(queue) == ["b0"] and len(queue) == 1
    leader.num_computed = leader.num_prompt_tokens
    assert names(queue) == ["a1"]


def test_siblings_of_an_ended_answer_wait_no_longer():
    queue, leader = Queue(), seq("a", 0)
    sibling = seq("a", 0, index=1)
    sibling.leader = leader
    leader.status = Status.ENDED
    queue.add(sibling)
    assert names(queue) == ["a1"]


def test_whoever_is_removed_is_gone():
    queue, first, second, third = Queue(), seq("a", 0), seq("b", 1), seq("c", 2)
    for waiting in (third, second, first):
        queue.add(waiting)
    queue.remove(second)
    assert names(queue) == ["a0", "c0"]
    queue.add(first)
    queue.clear()
    assert not queue and queue.pop() is None
