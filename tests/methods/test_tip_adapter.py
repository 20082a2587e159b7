import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from upclose import seeds
from upclose.methods import tip_adapter

C, D = 5, 16


@pytest.fixture
def shots():
    """7 test images, 12 keys of 4 of the 5 classes in no order."""
    draw = seeds.generator(0, "tip_adapter")
    image, key = (normalize(torch.randn(n, D, generator=draw), dim=1) for n in (7, 12))
    return image, key, torch.tensor([3, 0, 1, 4, 0, 1, 3, 3, 4, 0, 1, 1])


def test_scores_are_the_paper_s_formula(shots):
    image, key, label = shots
    expected = (-5.5 * (1 - image @ key.T)).exp() @ one_hot(label, C).float()
    assert torch.allclose(tip_adapter.scores(image, key, label, classes=C, beta=5.5), expected, atol=1e-5)


def test_a_class_without_a_key_gets_zero_and_beta_zero_counts_keys(shots):
    scores = tip_adapter.scores(*shots, classes=C, beta=0.0)
    assert torch.equal(scores, torch.tensor([3.0, 4, 0, 3, 2]).expand(7, C))


def test_an_empty_cache_votes_for_nothing(shots):
    image, key, label = shots
    assert torch.equal(tip_adapter.scores(image, key[:0], label[:0], classes=C, beta=1.0), torch.zeros(7, C))


def test_scores_depend_neither_on_the_order_of_keys_nor_on_the_chunk(shots, monkeypatch):
    image, key, label = shots
    expected = tip_adapter.scores(image, key, label, classes=C, beta=3.0)
    order = torch.arange(12).flip(0)
    assert torch.allclose(tip_adapter.scores(image, key[order], label[order], classes=C, beta=3.0), expected, atol=1e-6)
    monkeypatch.setattr(tip_adapter, "CHUNK", 2 * len(key))
    assert torch.allclose(tip_adapter.scores(image, key, label, classes=C, beta=3.0), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(label=torch.zeros(3, dtype=torch.int64)), "12 keys but 3 labels"),
        (dict(image=torch.ones(2, D + 1)), "17 dimensions"),
        (dict(classes=4), "labels 0 to 4, but there are 4 classes"),
        (dict(beta=-1.0), "beta -1.0"),
    ],
)
def test_scores_refuse_what_does_not_fit(shots, change, message):
    arguments = dict(zip(("image", "key", "label"), shots)) | dict(classes=C, beta=1.0) | change
    with pytest.raises(ValueError, match=message):
        tip_adapter.scores(**arguments)


def test_votes_stay_on_the_device_of_the_keys():
    image, key = torch.empty(7, D, device="meta"), torch.empty(12, D, device="meta")
    label = torch.empty(12, dtype=torch.int64, device="meta")
    votes = tip_adapter.cache_logits(tip_adapter.affinity(image, key, 2.0), label, C)
    assert votes.device.type == "meta"
    assert votes.shape == (7, C)


def test_shots_are_k_a_class_nested_seeded_and_all_where_there_are_fewer():
    label = np.array([2, 0, 0, 2, 2, 2, 0, 4, 2, 0])
    one, three = (tip_adapter.shots(label, k, seed=1) for k in (1, 3))
    assert label[three].tolist() == [0, 0, 0, 2, 2, 2, 4]
    assert len(set(three.tolist())) == 7
    assert one.tolist() == three[[0, 3, 6]].tolist()
    assert torch.equal(three, tip_adapter.shots(torch.from_numpy(label), 3, seed=1))
    assert len({tuple(tip_adapter.shots(label, 3, seed).tolist()) for seed in range(5)}) > 1


def test_the_shots_of_a_class_do_not_depend_on_other_classes():
    label = np.repeat([0, 1, 2], 20)
    alone = np.where(label == 1, 1, 7)
    mine = tip_adapter.shots(label, 4, seed=3)
    assert mine[label[mine] == 1].tolist() == [i for i in tip_adapter.shots(alone, 4, seed=3).tolist() if alone[i] == 1]


def test_no_shot_is_an_error():
    with pytest.raises(ValueError, match="0 shots"):
        tip_adapter.shots(np.zeros(3), 0)


def few(seed=0):
    """4 shots a class whose zero_shot-shot scores are wrong: classes 0 and 1 swapped."""
    draw = seeds.generator(seed, "few")
    centre = normalize(torch.randn(C, D, generator=draw), dim=1)
    target = torch.arange(C).repeat_interleave(4)
    image = normalize(centre[target] + 0.3 * torch.randn(len(target), D, generator=draw), dim=1)
    return image, target, image @ centre[[1, 0, 2, 3, 4]].T


def test_one_step_of_finetuning_is_one_step_of_adamw():
    image, target, zero_shot = few()
    tuned = tip_adapter.finetune(
        image, target, zero_shot, image, target, alpha=0.5, beta=4.0, epochs=1, learning_rate=0.01
    )
    key = image.clone().requires_grad_()
    logits = 100 * (zero_shot + 0.5 * (-4 * (1 - image @ key.T)).exp() @ one_hot(target, C).float())
    cross_entropy(logits, target).backward()
    g = key.grad
    expected = image * (1 - 0.01 * 0.01) - 0.01 * g / (g.abs() + 1e-4)
    assert torch.allclose(tuned, expected, atol=1e-5)


def test_finetuning_is_seeded_leaves_its_keys_alone_and_lowers_the_loss():
    image, target, zero_shot = few()
    before = image.clone()
    arguments, options = (
        (image, target, zero_shot, image, target),
        dict(alpha=0.05, beta=2.0, learning_rate=0.05, batch_size=6),
    )
    with torch.no_grad():
        tuned, again = (tip_adapter.finetune(*arguments, **options, seed=2) for _ in range(2))
    other = tip_adapter.finetune(*arguments, **options, seed=3)
    assert torch.equal(image, before)
    assert torch.equal(tuned, again)
    assert not torch.equal(tuned, other)
    assert not tuned.requires_grad

    def loss(key):
        return cross_entropy(
            100 * (zero_shot + 0.05 * tip_adapter.scores(image, key, target, classes=C, beta=2.0)), target
        )

    assert loss(tuned) < 0.8 * loss(image)


def test_finetuning_refuses_targets_that_do_not_fit():
    image, target, zero_shot = few()
    with pytest.raises(ValueError, match="20 images, 19 targets"):
        tip_adapter.finetune(image, target[:-1], zero_shot, image, target, alpha=1.0, beta=1.0)


def test_search_finds_the_pair_that_a_loop_finds():
    draw = seeds.generator(0, "search")
    zero_shot, label = torch.randn(40, C, generator=draw), torch.randint(0, C, (40,), generator=draw)
    tables = {beta: torch.randn(40, C, generator=draw) for beta in (1.0, 2.0, 3.0)}
    tables[2.0] += 2 * one_hot(label, C)
    alphas = (0.0, 0.5, 1.0, 5.0)
    best = max(
        ((float(((zero_shot + a * tables[b]).argmax(1) == label).float().mean()), -i, -j), a, b)
        for i, a in enumerate(alphas)
        for j, b in enumerate(tables)
    )
    choice = tip_adapter.search(zero_shot, tables.__getitem__, label, alphas=alphas, betas=list(tables))
    assert (choice.alpha, choice.beta) == best[1:]
    assert choice.accuracy == pytest.approx(best[0][0])
    assert choice.beta == 2.0


def test_of_equal_pairs_search_takes_the_first():
    zero_shot, label = torch.eye(C), torch.arange(C)
    assert tip_adapter.search(zero_shot, lambda beta: zero_shot, label, alphas=(0.0, 1.0), betas=(4.0, 5.0)) == (
        0.0,
        4.0,
        1.0,
    )


def test_search_with_nothing_to_try_is_an_error():
    with pytest.raises(ValueError, match="0 alphas"):
        tip_adapter.search(torch.eye(2), lambda beta: torch.eye(2), torch.arange(2), alphas=(), betas=(1.0,))


def test_finetuning_equals_a_plain_loop_over_epochs():
    image, target, zero_shot = few()
    tuned = tip_adapter.finetune(
        image,
        target,
        zero_shot,
        image,
        target,
        alpha=0.5,
        beta=4.0,
        epochs=3,
        learning_rate=0.01,
        batch_size=6,
        seed=2,
        logit_scale=30.0,
    )
    key, order = image.clone().requires_grad_(), seeds.generator(2, "tip_adapter.finetune")
    optimizer, step = torch.optim.AdamW([key], eps=1e-4), 0
    for _ in range(3):
        for rows in torch.randperm(20, generator=order).split(6):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + np.cos(np.pi * step / 12)) / 2
            logits = 30 * (zero_shot[rows] + 0.5 * (-4 * (1 - image[rows] @ key.T)).exp() @ one_hot(target, C).float())
            optimizer.zero_grad()
            cross_entropy(logits, target[rows]).backward()
            optimizer.step()
            step += 1
    torch.testing.assert_close(tuned, key.detach(), atol=1e-5, rtol=0)


def test_of_equally_good_pairs_the_first_alpha_is_taken():
    zero_shot, label = torch.tensor([[0.0, 1.0]]), torch.tensor([0])
    found = tip_adapter.search(
        zero_shot, lambda beta: torch.tensor([[beta, 0.0]]), label, alphas=(1.0, 4.0), betas=(0.5, 4.0)
    )
    assert found == (1.0, 4.0, 1.0)
