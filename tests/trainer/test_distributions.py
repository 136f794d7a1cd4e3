import pytest
import torch

from trainer import distributions
from trainer.distributions import describe_tokens

M, H, V = 7, 5, 11


@pytest.fixture
def head() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(H, V, bias=False)


def described(head, *, ref_hidden=None, has_entropy=True):
    source = torch.Generator().manual_seed(2)
    hidden = torch.randn(M, H, generator=source).requires_grad_()
    tokens = torch.randint(V, (M,), generator=source)
    temperature = 0.5 + torch.rand(M, generator=source)
    said = describe_tokens(
        head, hidden, tokens, temperature, ref_hidden, vocabulary=V, has_entropy=has_entropy
    )
    (said.logprobs.sum() + said.kl.sum()).backward()
    return said, hidden.grad, tokens, temperature


def test_a_token_is_described_by_the_state_before_it(head):
    said, _, tokens, temperature = described(head)
    source = torch.Generator().manual_seed(2)
    for i in range(M):
        state = torch.randn(M, H, generator=source)[i] if i == 0 else None
        if state is not None:
            probabilities = (head(state) / temperature[i]).softmax(dim=-1)
            assert said.logprobs[i].exp().item() == pytest.approx(probabilities[tokens[i]].item())
            surprise = -(probabilities * probabilities.log()).sum()
            assert said.entropy[i].item() == pytest.approx(surprise.item(), rel=1e-5)
    assert said.kl.tolist() == [0.0] * M


def test_the_reference_itself_is_no_divergence_away_and_others_are(head):
    own = torch.randn(M, H, generator=torch.Generator().manual_seed(2))
    said, *_ = described(head, ref_hidden=own)
    torch.testing.assert_close(said.kl, torch.zeros(M), atol=1e-6, rtol=0)
    said, *_ = described(head, ref_hidden=torch.zeros(M, H))
    assert (said.kl > 1e-3).all()


def test_logits_in_parts_change_neither_numbers_nor_gradient(head, monkeypatch):
    other = torch.randn(M, H, generator=torch.Generator().manual_seed(3))
    whole, gradient, *_ = described(head, ref_hidden=other)
    monkeypatch.setattr(distributions, "LOGITS_BYTES", 4 * V * 2)
    seen: list[int] = []

    def watched(hidden):
        seen.append(len(hidden))
        return head(hidden)

    parts, same_gradient, *_ = described(watched, ref_hidden=other)
    assert max(seen) == 2
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(same_gradient, gradient)


def test_entropy_gives_no_gradient_and_is_there_if_it_is_asked_for(head):
    said, *_ = described(head)
    assert not said.entropy.requires_grad
    assert (said.entropy > 0).all()
    said, *_ = described(head, has_entropy=False)
    assert said.entropy.tolist() == [0.0] * M
