"""k-NN, logistic regression, support vector machines and average precision against scikit-learn, on
features of real pictures drawn here."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from selfsight.evals.average_precision import average_precision
from selfsight.evals.heads_sweep import Standardizer
from selfsight.evals.knn import knn_predict_many
from selfsight.evals.logistic import fit_logistic
from selfsight.evals.multilabel import fit_binary
from tests.evals.small import scene_features


@pytest.fixture(scope="module")
def sets() -> tuple[torch.Tensor, ...]:
    return (*scene_features(300), *scene_features(100, "val"))


def test_knn(sets):
    bank, labels, queries, _ = sets
    found = knn_predict_many(bank, labels, queries, neighbours=[1, 10, 50], block=7)
    for k, predictions in found.items():
        theirs = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        )
        theirs.fit(bank.double().numpy(), labels.numpy())
        expected = theirs.predict(queries.double().numpy())
        assert (predictions.numpy() == expected).mean() >= 0.99  # equal votes may fall either way


def test_leave_one_out(sets):
    bank, labels, _, _ = sets
    found = knn_predict_many(bank, labels, bank, neighbours=[10], block=64, leave_one_out=True)[10]
    for index in range(0, 300, 37):
        rest = torch.arange(300) != index
        one = knn_predict_many(bank[rest], labels[rest], bank[index : index + 1], neighbours=[10])
        assert found[index] == one[10][0]


@pytest.mark.parametrize("c", [0.001, 1.0])
def test_logistic_regression(sets, c):
    x, labels, queries, _ = sets
    scale = Standardizer.of(x)
    x, queries = scale(x), scale(queries)
    weight, bias = fit_logistic(x, labels, classes=12, c=c, iterations=2000, tolerance=1e-9)
    theirs = LogisticRegression(C=c, max_iter=5000, tol=1e-9).fit(
        x.double().numpy(), labels.numpy()
    )
    ours = (queries.double() @ weight + bias).softmax(1).numpy()
    assert np.abs(ours - theirs.predict_proba(queries.double().numpy())).max() < 1e-3


def test_support_vector_machine(sets):
    x, labels, queries, _ = sets
    x, queries = torch.nn.functional.normalize(x), torch.nn.functional.normalize(queries)
    target = (labels < 4).to(torch.int8)
    weight, bias = fit_binary("svm", x, target[:, None], 1.0, iterations=2000)
    # an intercept of a large scale is hardly penalised: ours is not at all
    theirs = LinearSVC(C=1.0, intercept_scaling=100.0, max_iter=100_000, tol=1e-8)
    theirs.fit(x.double().numpy(), target.numpy())
    ours = (queries @ weight + bias)[:, 0].numpy()
    assert np.abs(ours - theirs.decision_function(queries.double().numpy())).max() < 0.01


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision(ties):
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        scores = torch.randn(200, generator=generator)
        scores = scores.round() if ties else scores
        targets = (torch.rand(200, generator=generator) < 0.2).int()
        expected = average_precision_score(targets.numpy(), scores.numpy())
        assert abs(average_precision(scores, targets) - expected) < 1e-12
