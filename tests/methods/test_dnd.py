import inspect
import itertools

import ot
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from upclose import seeds
from upclose.features import Text, Views
from upclose.methods import clip, dnd, tip_adapter

COUNTS = (3, 1, 4, 3)
C, D, N = len(COUNTS), 16, 4


def draws(seed, batch=6):
    """Views and ragged text whose cosines lie close together, as CLIP's do."""
    draw = seeds.generator(seed, "dnd")
    common = torch.randn(D, generator=draw)

    def unit(*shape):
        return normalize(common + 0.4 * torch.randn(*shape, D, generator=draw), dim=-1)

    return Views(unit(batch), unit(batch, N)), Text.from_lists(unit(C), [unit(m) for m in COUNTS])


@pytest.fixture
def world():
    return draws(0)


def each(views, text):
    """(image, class, cost) for every image and class, in order."""
    for b, crops in enumerate(views.crop):
        for c in range(len(text.label)):
            yield b, c, 1 - crops @ text.description[text.owner == c].T


def loop(function, views, text):
    return torch.tensor([float(function(cost)) for _, _, cost in each(views, text)]).view(len(views.image), -1)


def uniform(n):
    return torch.full((n,), 1 / n, dtype=torch.float64)


# zero-shot


def test_scores_are_minus_the_cost_of_pot_s_entropic_plan(world):
    def naive(cost):
        cost = cost.double()
        plan = ot.sinkhorn(uniform(cost.shape[0]), uniform(cost.shape[1]), cost, 0.05, stopThr=1e-12, numItermax=5000)
        return -(plan * cost).sum()

    assert torch.allclose(dnd.scores(*world, epsilon=0.05), loop(naive, *world), atol=1e-5)


def test_scores_at_the_default_epsilon_equal_pot_s(world):
    def naive(cost):
        cost = cost.double()
        a, b = uniform(cost.shape[0]), uniform(cost.shape[1])
        plan = ot.sinkhorn(a, b, cost, 0.01, stopThr=1e-9, numItermax=4000, warn=False)
        return -(plan * cost).sum()

    views, text = world
    views = views.select(slice(0, 3))
    assert torch.allclose(dnd.scores(views, text, max_iter=4000), loop(naive, views, text), atol=1e-5)


def test_exact_scores_are_minus_pot_s_emd(world):
    def naive(cost):
        return -ot.emd2(uniform(cost.shape[0]), uniform(cost.shape[1]), cost.double())

    expected = loop(naive, *world)
    assert torch.allclose(dnd.scores(*world, exact=True), expected, atol=1e-6)
    assert torch.allclose(dnd.scores(*world, epsilon=0.001, max_iter=5000), expected, atol=1e-3)


def test_in_the_log_domain_rounds_go_on_only_for_slow_pairs_and_change_no_other(world, monkeypatch):
    views, text = world[0].select(slice(0, 3)), world[1]
    expected = dnd.scores(views, text, epsilon=0.002, max_iter=1600)
    sizes = []
    sinkhorn = dnd.transport.sinkhorn

    def counted(cost, *arguments):
        sizes.append(len(cost))
        return sinkhorn(cost, *arguments)

    monkeypatch.setattr(dnd.transport, "sinkhorn", counted)
    assert torch.equal(dnd.scores(views, text, epsilon=0.002, max_iter=1600), expected)
    assert sizes[0] == len(views.image) * C
    assert len(sizes) > 1
    assert sizes[-1] < sizes[0]
    assert all(more >= fewer for more, fewer in itertools.pairwise(sizes))
    once = [
        -(sinkhorn(cost[None], uniform(N), uniform(cost.shape[1]), 0.002, 1600, 1e-5)[0] * cost).sum()
        for _, _, cost in each(views, text)
    ]
    assert torch.allclose(expected.flatten(), torch.stack(once), atol=1e-5)


def test_plans_have_uniform_marginals_cost_the_score_and_are_zero_where_padded(world):
    views, text = world
    plan = dnd.plans(views, text, epsilon=0.05)
    assert plan.shape == (6, C, N, max(COUNTS))
    scores = dnd.scores(views, text, epsilon=0.05)
    for b, c, cost in each(views, text):
        mine, rest = plan[b, c, :, : COUNTS[c]], plan[b, c, :, COUNTS[c] :]
        assert torch.equal(rest, torch.zeros_like(rest))
        assert torch.allclose(mine.sum(1).double(), uniform(N), atol=2e-5)
        assert torch.allclose(mine.sum(0).double(), uniform(COUNTS[c]), atol=2e-5)
        assert -(mine * cost).sum() == pytest.approx(float(scores[b, c]), abs=1e-6)


def test_infinite_epsilon_is_the_unweighted_mean_and_so_is_one_description(world):
    views, text = world
    control = clip.multi_crop_scores(views, text) - 1
    assert torch.allclose(dnd.scores(views, text, epsilon=float("inf")), control, atol=1e-5)
    assert torch.allclose(dnd.scores(views, text)[:, 1], control[:, 1], atol=1e-5)


def test_one_crop_that_is_the_image_is_the_mean_over_descriptions(world):
    views, text = world
    whole = Views(views.image, views.image[:, None])
    assert torch.allclose(dnd.scores(whole, text), clip.description_scores(whole, text) - 1, atol=1e-5)


def test_a_class_scores_the_same_beside_longer_classes_and_in_any_order_of_crops(world, monkeypatch):
    views, text = world
    scores = dnd.scores(views, text, epsilon=0.05)
    for c in range(C):
        alone = Text.from_lists(text.label[c : c + 1], [text.description[text.owner == c]])
        assert torch.allclose(dnd.scores(views, alone, epsilon=0.05)[:, 0], scores[:, c], atol=1e-5)
    assert torch.allclose(dnd.scores(Views(views.image, views.crop.flip(1)), text, epsilon=0.05), scores, atol=1e-5)
    assert torch.allclose(dnd.scores(views.select(slice(2, 3)), text, epsilon=0.05), scores[2:3], atol=1e-5)
    monkeypatch.setattr(dnd, "CHUNK", 1)
    assert torch.allclose(dnd.scores(views, text, epsilon=0.05), scores, atol=1e-5)


def test_max_scores_drop_the_marginal_on_the_crops(world):
    expected = loop(lambda cost: -cost.min(0).values.mean(), *world)
    assert torch.allclose(dnd.max_scores(*world), expected, atol=1e-6)
    assert (expected >= dnd.scores(*world, exact=True) - 1e-6).all()


def test_assignment_pairs_one_to_one_and_is_the_exact_distance_for_equal_numbers(world):
    scores = dnd.assignment_scores(*world)
    assert torch.allclose(scores[:, 2], dnd.scores(*world, exact=True)[:, 2], atol=1e-6)  # N = M = 4
    best = loop(lambda cost: -cost.min(), *world)
    assert torch.allclose(scores[:, 1], best[:, 1], atol=1e-6)  # one description: its nearest crop


def test_no_crop_and_a_class_without_description_are_errors(world):
    views, text = world
    with pytest.raises(ValueError, match="no crop"):
        dnd.scores(Views(views.image, views.crop[:, :0]), text)
    kept = text.owner != 1
    with pytest.raises(ValueError, match=r"classes \[1\] have no description"):
        dnd.scores(views, Text(text.label, text.description[kept], text.owner[kept]))


# few-shot


def test_the_local_cache_of_a_hand_made_example():
    e = torch.eye(4)
    text = Text.from_lists(e[:3], [e[[0, 1]], e[[2]], e[[3, 0, 1]]])
    crop = torch.stack(
        [
            torch.stack([e[0], e[1], e[2]]),  # class 0: descriptions e0, e1
            torch.stack([e[1], e[0], e[3]]),  # class 2: e3, e0, e1
            torch.stack([e[3], e[3], normalize(e[1] + e[0], dim=0)]),  # class 0
        ]
    )
    cache = dnd.local_cache(Views(crop.mean(1), crop), torch.tensor([0, 2, 0]), text)
    assert cache.image.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert cache.label.tolist() == [0, 0, 2, 2, 2, 0, 0]
    assert cache.description.tolist() == [0, 1, 3, 4, 5, 0, 1]
    picked = [crop[0, 0], crop[0, 1], crop[1, 2], crop[1, 1], crop[1, 0], crop[2, 2], crop[2, 2]]
    assert torch.equal(cache.key, torch.stack(picked))


def test_local_cache_and_its_scores_equal_a_naive_loop():
    views, text = draws(1, batch=5)
    test, _ = draws(2)
    label = torch.tensor([2, 0, 0, 1, 2])  # no shot of class 3
    cache = dnd.local_cache(views, label, text)
    keys = [
        (int(label[b]), max(views.crop[b], key=lambda crop, i=i: float(crop @ text.description[i])))
        for b in range(5)
        for i in range(len(text.description))
        if text.owner[i] == label[b]
    ]
    assert torch.equal(cache.key, torch.stack([key for _, key in keys]))
    expected = torch.zeros(len(test.image), C)
    for b, crops in enumerate(test.crop):
        for crop in crops:
            for c, key in keys:
                expected[b, c] += (-4.0 * (1 - crop @ key)).exp() / N
    scores = dnd.cache_scores(test, cache, C, beta=4.0)
    assert torch.allclose(scores, expected, atol=1e-5)
    assert torch.equal(scores[:, 3], torch.zeros(len(scores)))


def test_with_one_crop_that_is_the_image_the_cache_is_tip_adapter_with_repeated_keys(world):
    views, text = world
    whole, label = Views(views.image, views.image[:, None]), torch.tensor([0, 2, 2, 0, 3, 1])
    cache = dnd.local_cache(whole, label, text)
    repeats = torch.tensor(COUNTS)[label]
    key, owner = views.image.repeat_interleave(repeats, 0), label.repeat_interleave(repeats)
    assert torch.equal(cache.key, key)
    expected = tip_adapter.scores(views.image, key, owner, classes=C, beta=2.0)
    assert torch.allclose(dnd.cache_scores(whole, cache, C, 2.0), expected, atol=1e-5)


def test_only_the_local_aware_cache_sees_evidence_that_one_crop_holds():
    """Two classes differ in one part; the rest of an image is background, in the test that of the other class."""
    e = torch.eye(6)
    part, ground = e[[0, 1]], e[[2, 3]]

    def picture(c, background):
        crop = torch.stack([part[c], *[normalize(ground[background] + 0.1 * e[4 + k], dim=0) for k in (0, 1)]])
        return normalize(crop.sum(0), dim=0), crop

    def views(pictures):
        return Views(*(torch.stack(side) for side in zip(*pictures)))

    text = Text.from_lists(part, [part[[0]], part[[1]]])
    label = torch.tensor([0, 1])
    train, test = views([picture(0, 0), picture(1, 1)]), views([picture(0, 1), picture(1, 0)])
    local = dnd.cache_scores(test, dnd.local_cache(train, label, text), 2, beta=5.0)
    whole = tip_adapter.scores(test.image, train.image, label, classes=2, beta=5.0)
    assert torch.equal(local.argmax(1), label)
    assert torch.equal(whole.argmax(1), 1 - label)


def test_cache_scores_do_not_depend_on_the_batch_or_the_chunk(world, monkeypatch):
    views, text = world
    cache = dnd.local_cache(views, torch.tensor([0, 1, 2, 3, 0, 1]), text)
    scores = dnd.cache_scores(views, cache, C, 3.0)
    assert torch.allclose(dnd.cache_scores(views.select(slice(4, 6)), cache, C, 3.0), scores[4:], atol=1e-6)
    monkeypatch.setattr(dnd, "CHUNK", 1)
    assert torch.allclose(dnd.cache_scores(views, cache, C, 3.0), scores, atol=1e-6)


def test_labels_that_do_not_fit_are_errors(world):
    views, text = world
    with pytest.raises(ValueError, match="6 images but 2 labels"):
        dnd.local_cache(views, torch.tensor([0, 1]), text)
    with pytest.raises(ValueError, match="labels 0 to 4, but text has 4 classes"):
        dnd.local_cache(views, torch.tensor([0, 1, 2, 3, 4, 0]), text)


def test_nothing_that_scores_test_images_takes_their_labels():
    for function in (dnd.scores, dnd.plans, dnd.cache_scores, dnd.stream, dnd.max_scores, dnd.assignment_scores):
        assert not {"label", "labels", "target", "y"} & set(inspect.signature(function).parameters)


# test-time


def naive_stream(views, text, capacity, alpha, beta, zero_shot):
    """TDA's queue with local-aware keys, image after image."""
    queues, result = {}, []
    for crops, z in zip(views.crop, zero_shot):
        p = (100 * z.double()).softmax(0)
        entropy, c = -(p * p.log()).nan_to_num().sum().item(), int(z.argmax())
        descriptions = text.description[text.owner == c]
        queue = queues.setdefault(c, [])
        queue.append((entropy, [crops[(crops @ d).argmax()] for d in descriptions]))
        queue.sort(key=lambda item: item[0])
        del queue[capacity:]
        cache = torch.zeros(len(z))
        for label, items in queues.items():
            for _, keys in items:
                for key in keys:
                    cache[label] += (-beta * (1 - crops @ key)).exp().mean()
        result.append(z + alpha * cache)
    return torch.stack(result)


@pytest.mark.parametrize("capacity", [1, 3, 100])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_stream_equals_a_loop_over_images_whatever_the_batch(capacity, batch_size):
    views, text = draws(3, batch=30)
    zero_shot = clip.multi_crop_scores(views, text)
    assert len(zero_shot.argmax(1).unique()) > 1
    expected = naive_stream(views, text, capacity, 0.1, 5.0, zero_shot)
    scores = dnd.stream(views, text, capacity, alpha=0.1, beta=5.0, zero_shot=zero_shot, batch_size=batch_size)
    assert torch.allclose(scores, expected, atol=1e-5)


def test_the_stream_depends_on_the_order_but_not_on_what_comes_later():
    views, text = draws(4, batch=30)
    zero_shot = clip.multi_crop_scores(views, text)
    scores = dnd.stream(views, text, 2, alpha=1.0, zero_shot=zero_shot)
    first = dnd.stream(views.select(slice(0, 11)), text, 2, alpha=1.0, zero_shot=zero_shot[:11])
    assert torch.allclose(first, scores[:11], atol=1e-5)
    back = dnd.stream(views.select(torch.arange(29, -1, -1)), text, 2, alpha=1.0, zero_shot=zero_shot.flip(0)).flip(0)
    assert (back - scores).abs().max() > 0.1


def test_the_stream_starts_from_zero_shot_scores(world):
    views, text = world[0].select(slice(0, 2)), world[1]
    zero_shot = dnd.scores(views, text)
    assert torch.equal(dnd.stream(views, text, alpha=0.0), zero_shot)
    assert torch.equal(dnd.stream(views, text, zero_shot=zero_shot), dnd.stream(views, text))


def test_an_unusable_queue_or_zero_shot_table_is_an_error(world):
    views, text = world
    with pytest.raises(ValueError, match="capacity of at least 1"):
        dnd.stream(views, text, capacity=0)
    with pytest.raises(ValueError, match=r"zero_shot \(2, 4\), but there are 6 images"):
        dnd.stream(views, text, zero_shot=torch.zeros(2, C))


def test_of_equal_entropies_the_oldest_stay():
    for entropy, capacity, leave in (([0.5, 0.5], 1, [2, 1]), ([0.5, 0.5, 0.1], 2, [3, 2, 3])):
        answer = torch.zeros(len(entropy), dtype=torch.int64)
        assert tip_adapter.queue(answer, torch.tensor(entropy), capacity).tolist() == leave


@pytest.mark.parametrize("capacity", [0, 1, 3])
def test_a_device_settles_the_queues_as_a_heap_does(capacity, monkeypatch):
    monkeypatch.setattr(tip_adapter, "CHUNK", 300)
    draw = torch.Generator().manual_seed(0)
    answer = torch.randint(0, 4, (80,), generator=draw)
    entropy = torch.randint(0, 9, (80,), generator=draw) / 9  # with ties
    admitted = torch.rand(80, generator=draw) < 0.8
    leave = tip_adapter.queue(answer, entropy, capacity, admitted)
    assert torch.equal(tip_adapter._queue_by_rank(answer, entropy, capacity, admitted), leave)
    step = torch.arange(80)
    assert ((leave > step) <= admitted).all()
    for now in step.split(7):
        image, held = tip_adapter.present(leave, now, 4 * capacity + 7)
        assert len(image) <= 4 * capacity + 7
        assert torch.equal(held.sum(0), ((step[:, None] <= now) & (now < leave[:, None])).sum(0))


def test_exact_plans_have_the_exact_cost():
    views, text = draws(5)
    plans, scores = dnd.plans(views, text, exact=True), dnd.scores(views, text, exact=True)
    for c in range(len(text.label)):
        cost = 1 - views.crop @ text.description[text.owner == c].T
        moved = (plans[:, c, :, : cost.shape[-1]] * cost).sum((1, 2))
        torch.testing.assert_close(-moved, scores[:, c], atol=1e-6, rtol=0)


def test_a_cache_of_more_images_than_a_chunk():
    views, text = draws(6, batch=1030)
    label = torch.arange(1030) % len(text.label)
    key = dnd.local_cache(views.select(slice(1020, None)), label[1020:], text).key
    assert torch.equal(dnd.local_cache(views, label, text).key[-len(key) :], key)


def test_votes_wait_for_no_device():
    with FakeTensorMode(), torch.device("cuda"):
        whole = torch.zeros(6, dtype=torch.int64)
        cache = dnd.Cache(torch.empty(6, D), whole, whole, whole)
        views = Views(torch.empty(5, D), torch.empty(5, N, D))
        assert dnd.cache_scores(views, cache, C, 2.0).shape == (5, C)
        votes = tip_adapter.scores(views.image, cache.key, cache.label, classes=C, beta=2.0)
        assert (votes.shape, votes.device.type) == ((5, C), "cuda")
