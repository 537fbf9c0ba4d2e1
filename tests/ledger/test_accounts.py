"""The ledger over rounds: who is charged what, when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fedsparse.core.errors import RunError
from fedsparse.core.ledger import HEADER, Ledger, Tally, Traffic

Tensors = dict[str, torch.Tensor]
PARAMS = {"fc.weight": torch.ones(16, 16), "fc.bias": torch.ones(16)}
BUFFERS = {"mean": torch.ones(16), "steps": torch.tensor(3)}
MACS = {"fc.weight": 768.0}
# bytes: a header, 64 of biases, 64 + 8 of buffers; a bitmap of 256 positions with its tag
REST, BITMAP = HEADER + 64 + 72, 33


def rows(*chosen: int) -> Tensors:
    """A mask of whole rows, 16 weights each."""
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[list(chosen)] = True
    return {"fc.weight": mask}


QUARTER, NOTHING = rows(0, 1, 2, 3), rows()


def moved() -> Tensors:
    """QUARTER with weight 63 moved to 100."""
    mask = rows(0, 1, 2, 3)
    mask["fc.weight"].view(-1)[63], mask["fc.weight"].view(-1)[100] = False, True
    return mask


def make(**options: Any) -> Ledger:
    return Ledger(PARAMS, BUFFERS, MACS, **{"encode": True, **options})


def begin(ledger: Ledger, mask: Tensors, frozen: Tensors = NOTHING) -> None:
    params = {"fc.weight": PARAMS["fc.weight"] * mask["fc.weight"], "fc.bias": PARAMS["fc.bias"]}
    ledger.begin_round(params, BUFFERS, mask, frozen)


def test_mask_is_charged_once() -> None:
    """A client that took part with the same mask holds it; one never seen gets it."""
    ledger = make()
    begin(ledger, QUARTER)
    assert ledger.download(1).size == 256 + REST + BITMAP
    assert ledger.upload(1, QUARTER, PARAMS, BUFFERS).size == 256 + REST
    ledger.end_round()
    begin(ledger, rows(0, 1, 2, 3))  # another object, the same mask
    assert ledger.download(1).size == 256 + REST
    assert ledger.download(2).size == 256 + REST + BITMAP
    ledger.end_round()
    assert ledger.round == Tally(0, 2 * (256 + REST) + BITMAP, 0.0, 0.0)
    up, down = 256 + REST, 3 * (256 + REST) + 2 * BITMAP
    assert ledger.total == Tally(up, down, 4.0 * (64 + 64 + 32), 0.0, 256, 0, 64 + 72)


def test_moved_mask_is_a_difference_for_who_holds_the_last_one() -> None:
    """Two changed positions: tag, count and two gaps; whoever holds an older mask gets the bitmap."""
    ledger = make()
    begin(ledger, rows(5))
    ledger.download(2)
    begin(ledger, QUARTER)
    ledger.download(1)
    begin(ledger, moved())
    assert ledger.download(1).size == 256 + REST + 4
    assert ledger.download(2).size == 256 + REST + BITMAP
    assert ledger.download(3).size == 256 + REST + BITMAP
    begin(ledger, QUARTER)  # back again: a new version, though the mask was seen before
    assert ledger.download(2).size == 256 + REST + 4


def test_dense_mask_is_known_to_all() -> None:
    """A dense method never pays for a mask; the first sparse one is coded against the dense one."""
    ledger = make()
    dense = rows(*range(16))
    begin(ledger, dense)
    assert ledger.download(1).size == 1024 + REST
    assert ledger.upload(1, dense, PARAMS, BUFFERS).size == 1024 + REST
    almost = rows(*range(16))
    almost["fc.weight"][0, 0] = False
    begin(ledger, almost)
    assert ledger.download(1).size == ledger.download(2).size == 1020 + REST + 3


def test_frozen_values_are_charged_at_first_contact() -> None:
    """PFFDST document, 5.2: 4·|F| and the code of F once per client, then trainable weights only."""
    ledger = make()
    begin(ledger, QUARTER)
    ledger.download(1)
    ledger.end_round()
    grown = rows(0, 1, 2, 3, 4, 5)
    first = 4 * 64 + (1 + 96 // 8)
    for client, expected in [
        (1, 128 + REST + BITMAP + first),
        (2, 128 + REST + BITMAP + first),
        (1, 128 + REST),
    ]:
        begin(ledger, grown, QUARTER)
        assert ledger.download(client).size == expected
        assert ledger.upload(client, grown, PARAMS, BUFFERS).size == 128 + REST
        ledger.end_round()


def test_client_mask_is_charged_against_the_servers() -> None:
    """FedDST document, invariant 15: values by the client's own mask, and the mask as changed positions."""
    ledger = make()
    begin(ledger, QUARTER)
    ledger.download(1)
    own = moved()
    own["fc.weight"][8, 0] = True
    assert ledger.upload(1, own, PARAMS, BUFFERS).size == 4 * 65 + REST + (1 + 1 + 3)
    ledger.download(2)
    equal = rows(0, 1, 2, 3)  # readjusted to the same mask: the server has to be told
    assert ledger.upload(2, equal, PARAMS, BUFFERS).size == 256 + REST + 2


def test_support_of_a_sparse_upload() -> None:
    """A method with a dense mask pays for the support of what it sends (Top-K)."""
    ledger = make()
    begin(ledger, rows(*range(16)))
    ledger.download(1)
    support = rows()
    support["fc.weight"].view(-1)[[3, 50, 120, 121, 255]] = True
    assert ledger.upload(1, support, PARAMS, BUFFERS).size == 4 * 5 + REST + (1 + 1 + 5 + 1)


def test_flops() -> None:
    """Forward and input gradient at density 1/4, then 3/8 of which 1/8 trains; 2 FLOPs a MAC."""
    ledger = make()
    begin(ledger, QUARTER)
    assert ledger.train(10) == 10 * 2 * (192 + 192 + 192)
    assert ledger.train(0, score_samples=3) == 3 * 2 * (192 + 192 + 768)
    ledger.end_round()
    begin(ledger, rows(0, 1, 2, 3, 4, 5), QUARTER)
    assert ledger.train(1) == 2 * (288 + 288 + 96)
    ledger.end_round()
    assert ledger.metrics()["flops_total"] == 11520 + 6912 + 1344


def test_traffic_for_the_papers_formula() -> None:
    """A formula sees one client's round; its bytes stand beside the honest ones."""
    seen: list[Traffic] = []

    def formula(traffic: Traffic) -> float:
        seen.append(traffic)
        return 0.5

    ledger = make(paper=formula)
    begin(ledger, QUARTER)
    ledger.download(1)
    ledger.upload(1, QUARTER)
    begin(ledger, rows(0, 1, 2, 3, 4, 5), QUARTER)
    for client in (1, 2):
        ledger.download(client)
        ledger.upload(client, rows(0, 1, 2, 3, 4) if client == 1 else ledger_mask(ledger))
    plain = Traffic(
        round=0,
        weights=256,
        active=64,
        active_upload=64,
        frozen=0,
        unmasked=16,
        biases=16,
        mask_changed=True,
        client_readjusted=False,
        first_contact=True,
    )
    later = plain._replace(round=1, active=96, active_upload=96, frozen=64)
    assert seen == [
        plain,
        later._replace(active_upload=80, client_readjusted=True, first_contact=False),
        later,
    ]
    assert ledger.round.paper_bytes == 1.0


def ledger_mask(ledger: Ledger) -> Tensors:
    """The server's very mask of the open round."""
    mask = ledger._mask
    assert mask is not None
    return mask


def run(ledger: Ledger, start: int, stop: int) -> list[dict[str, float]]:
    """Rounds with a mask that moves, freezing at round 3, two clients each."""
    lines = []
    for index in range(start, stop):
        mask = moved() if index in (1, 4) else QUARTER
        frozen = rows(0) if index >= 3 else NOTHING
        begin(ledger, mask, frozen)
        for client in (index % 3, 7):
            ledger.download(client)
            ledger.train(40, 8)
            ledger.upload(client, mask if client == 7 else moved(), PARAMS, BUFFERS)
        ledger.end_round()
        lines.append(ledger.metrics())
    return lines


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_resumed_ledger_goes_on(cut: int) -> None:
    """The state of a ledger is all that later rounds depend on."""
    whole = make()
    lines = run(whole, 0, 6)
    before, after = make(), make()
    run(before, 0, cut)
    after.load_state(before.state())
    assert run(after, cut, 6) == lines[cut:]
    assert after.total == whole.total


def test_two_workers_are_one() -> None:
    """Summed rounds, and every worker knows what the other one's clients hold."""
    alone, workers = make(), [make(), make()]
    for _ in range(2):
        for ledger in (alone, *workers):
            begin(ledger, QUARTER)
        for client in (1, 2, 3):
            for ledger in (alone, workers[client % 2]):
                ledger.download(client)
                ledger.train(5)
                ledger.upload(client, QUARTER if ledger is alone else ledger_mask(ledger))
        alone.end_round()
        summed = torch.tensor([list(ledger.round) for ledger in workers], dtype=torch.float64).sum(0).tolist()
        for ledger in workers:
            ledger.end_round(summed, clients=(1, 2, 3))
            assert ledger.metrics() == alone.metrics()
    assert isinstance(workers[0].total.upload_bytes, int)
    begin(workers[0], QUARTER)
    assert workers[0].download(3).size == 256 + REST


def test_a_call_touches_no_tensor() -> None:
    """With an unchanged mask a client costs host arithmetic, and so does opening the next round."""

    class Forbid(TorchFunctionMode):
        def __torch_function__(self, func: Any, *_: Any, **__: Any) -> Any:
            raise AssertionError(f"{func} was called")

    ledger = make(encode=False)
    ledger.begin_round(PARAMS, BUFFERS, QUARTER, NOTHING)
    with Forbid():
        ledger.begin_round(PARAMS, BUFFERS, QUARTER, NOTHING)
        for client in range(3):
            ledger.download(client)
            ledger.train(40, 8)
            ledger.upload(client, QUARTER)
        ledger.end_round()
    assert ledger.total.upload_bytes > 0  # the clients were charged all the same


def test_encode_proves_uploads() -> None:
    """With `encode`, a message that is not what was charged stops the run."""
    ledger = make()
    begin(ledger, QUARTER)
    ledger.download(1)
    with pytest.raises(RunError, match="bytes was charged as"):
        ledger.upload(1, QUARTER, PARAMS, {})


def test_misuse_raises() -> None:
    """No charge without a round, no upload without a download."""
    ledger = make()
    with pytest.raises(RunError, match="no open round"):
        ledger.download(1)
    begin(ledger, QUARTER)
    with pytest.raises(RunError, match="client 1 uploads in round 0 without"):
        ledger.upload(1, QUARTER)
    ledger.download(1)
    ledger.upload(1, QUARTER)
    with pytest.raises(RunError, match="without having downloaded"):
        ledger.upload(1, QUARTER)
