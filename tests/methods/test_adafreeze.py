"""AdaFreeze is PFFDST with one slot swapped, under a name."""

import torch


def test_it_is_pffdst_with_the_server_of_fedadam(make_engine):
    """To the bit: what the swap on the command line gives."""
    changes = {
        "federation__rounds": 16,
        "method__readjust__period": 1,
        "ledger__encode": True,
    }
    named, swapped = (
        make_engine("adafreeze", **changes),
        make_engine("pffdst", ["aggregate=fedadam"], **changes),
    )
    one, other = (list(engine.rounds(engine.start())) for engine in (named, swapped))
    for ours, theirs in zip(one, other, strict=True):
        alike = ("train_loss", "sparsity", "frozen_fraction", "upload_bytes", "paper_bytes_total")
        assert [ours.metrics[name] for name in alike] == [theirs.metrics[name] for name in alike]
    ours, theirs = one[-1].state, other[-1].state
    assert all(torch.equal(p, theirs.params[name]) for name, p in ours.params.items())
    assert all(torch.equal(m, theirs.mask[name]) for name, m in ours.mask.items())


def test_frozen_weights_have_no_momentum(make_engine):
    """From mid-run on the server moves half B only, and remembers nothing of half A."""
    engine = make_engine("adafreeze", federation__rounds=16, method__readjust__period=1)
    reports = list(engine.rounds(engine.start()))
    state = reports[-1].state
    assert sum(f.sum().item() for f in state.frozen.values()) > 0
    first = state.memory["aggregate"]["first"]
    assert any(m.any() for m in first.values())
    for name, frozen in state.frozen.items():
        assert not first[name][frozen].any()
