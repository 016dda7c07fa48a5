"""Programs without a fault, though they look like one: ``CORRECT`` are ``pytest.param(program, ranks)``."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from src import Group


def polls_a_message(group: Group) -> None:
    x = torch.zeros(2)
    if group.rank == 0:
        work = dist.irecv(x, src=1)
        polls = 0
        while not work.is_completed():
            polls += 1
        assert x.sum() == 2
    else:
        for _ in range(100):
            torch.ones(8, 8).sum()
        dist.send(x + 1, dst=0)


def polls_with_a_deadline(group: Group) -> None:
    """A monitored loop: it gives up when time is over, which it is not."""
    if group.rank == 0:
        time.sleep(0.05)
    x = torch.ones(1)
    work = dist.all_reduce(x, async_op=True)
    deadline = time.monotonic() + 10
    while not work.is_completed():
        assert time.monotonic() < deadline, "the others are late"
        time.sleep(0.001)
    assert x == group.world_size


def polls_for_a_while(group: Group) -> None:
    """Looks a few times whether the message is there, then does something else first."""
    x = torch.zeros(1)
    if group.rank == 0:
        work = dist.irecv(x, src=1, tag=7)
        for _ in range(20):
            if work.is_completed():
                break
        dist.send(torch.ones(1), dst=1)
        work.wait()
        assert x == 2
    else:
        dist.recv(x, src=0)
        dist.send(x + 1, dst=0, tag=7)


def ring_of_batches(group: Group) -> None:
    right, left = (group.rank + 1) % group.world_size, (group.rank - 1) % group.world_size
    mine, theirs = torch.full((3,), float(group.rank)), torch.empty(3)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, right), dist.P2POp(dist.irecv, theirs, left)]):
        work.wait()
    assert (theirs == left).all()


def receives_from_anybody(group: Group) -> None:
    if group.rank == 0:
        x, senders = torch.empty(1), []
        for _ in range(group.world_size - 1):
            senders.append(dist.recv(x))
            assert x == senders[-1]
        assert sorted(senders) == list(range(1, group.world_size))
    else:
        dist.send(torch.tensor([float(group.rank)]), dst=0)


def used_after_wait(group: Group) -> None:
    x, other = torch.ones(4), torch.zeros(4)
    work = dist.all_reduce(x, async_op=True)
    other += 1
    work.wait()
    assert (x + other == group.world_size + 1).all()


def view_taken_before_wait(group: Group) -> None:
    """A view and a shape read no data."""
    whole = torch.zeros(group.world_size, 2)
    work = dist.all_gather(list(whole.unbind()), torch.ones(2), async_op=True)
    last, flat = whole[-1], whole.view(-1)
    assert flat.shape == (2 * group.world_size,)
    work.wait()
    assert last.sum() == 2


def read_while_it_is_sent(group: Group) -> None:
    x = torch.ones(4)
    if group.rank == 0:
        work = dist.isend(x, dst=1)
        assert x.sum() == 4
        work.wait()
        x.zero_()
    else:
        dist.recv(x, src=0)


def barriers_on_different_lines(group: Group) -> None:
    """One rank prepares while the others wait, then the others do."""
    if group.rank == 0:
        dist.barrier()
    if group.rank != 0:
        dist.barrier()
        dist.barrier()
    if group.rank == 0:
        dist.barrier()


def two_lines_in_the_same_order(group: Group) -> None:
    x = torch.ones(2)
    for _ in range(2):
        if group.rank == 0:
            dist.all_reduce(x)
        else:
            dist.all_reduce(x)


def crossed_waits(group: Group) -> None:
    groups = [dist.new_group(list(range(group.world_size))) for _ in range(2)]
    tensors = [torch.ones(2), torch.ones(2) * 10]
    works = [dist.all_reduce(x, group=g, async_op=True) for x, g in zip(tensors, groups, strict=True)]
    for k in (0, 1) if group.rank % 2 else (1, 0):
        works[k].wait()
    assert tensors[1].sum() == 10 * tensors[0].sum()


def roots_in_turn(group: Group) -> None:
    """Each rank in turn sends from one line and receives at another."""
    x = torch.zeros(2)
    for root in range(group.world_size):
        if group.rank == root:
            dist.broadcast(torch.full((2,), float(root)), src=root)
        else:
            dist.broadcast(x, src=root)
            assert (x == root).all()


def zeros_in_turn(group: Group) -> None:
    """Uneven inputs: a rank without a batch contributes zeros from another line."""
    total = 0.0
    for step in range(4):
        if step % group.world_size == group.rank:
            loss = torch.ones(1)
            dist.all_reduce(loss)
            total += loss.item()
        else:
            nothing = torch.zeros(1)
            dist.all_reduce(nothing)
            total += nothing.item()
    assert total == 4


def ranks_leave_after_their_part(group: Group) -> None:
    """A rank that returns early has done its part."""
    first, others = dist.new_group([0, 1]), dist.new_group(list(range(1, group.world_size)))
    if group.rank < 2:
        dist.all_reduce(torch.ones(1), group=first)
    if group.rank == 0:
        return
    dist.barrier(others)


CORRECT = [
    pytest.param(program, ranks, id=program.__name__)
    for program, ranks in [
        (polls_a_message, 2),
        (polls_with_a_deadline, 3),
        (polls_for_a_while, 2),
        (ring_of_batches, 4),
        (receives_from_anybody, 4),
        (used_after_wait, 3),
        (view_taken_before_wait, 3),
        (read_while_it_is_sent, 2),
        (barriers_on_different_lines, 3),
        (two_lines_in_the_same_order, 3),
        (crossed_waits, 4),
        (roots_in_turn, 3),
        (zeros_in_turn, 2),
        (ranks_leave_after_their_part, 4),
    ]
]
