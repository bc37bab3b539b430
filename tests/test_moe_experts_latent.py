import pytest
import torch
from torch.nn.functional import silu

import moe.experts.latent
import offload
from moe import MoEForCausalLM
from moe.experts.latent import LatentExperts

E, D, F, U, K, T = 6, 32, 24, 5, 2, 20


def latent_config(tiny_config, group=4, rank=U, **overrides):
    options = {"group": group, "rank": rank}
    return tiny_config(architecture="latent", architecture_options=options, **overrides)


def build_experts(tiny_config, **options):
    experts = LatentExperts(tiny_config(), **options).double()
    experts.init_parameters(0.3)
    return experts


def plain_loop(x_TD, expert_TK, weight_TK, experts):
    """One token, one slot, full matrices multiplied out, element by element where it matters."""
    rows = []
    for x_D, ids, weights in zip(x_TD, expert_TK.tolist(), weight_TK, strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= E:
                continue
            group = expert // experts.group
            gate = experts.gate_up_proj[expert][:F] @ experts.gate_basis[group]
            up = experts.gate_up_proj[expert][F:] @ experts.up_basis[group]
            y_D = y_D + weight * (experts.down_proj[expert] @ (silu(gate @ x_D) * (up @ x_D)))
        rows.append(y_D)
    return torch.stack(rows)


@pytest.mark.parametrize("group", [1, 2, 4, 6])
def test_experts_equal_a_plain_loop_with_the_matrices_multiplied_out(tiny_config, tolerance, group):
    experts = build_experts(tiny_config, group=group, rank=U)
    x_TD = torch.randn(T, D).double().requires_grad_()
    expert_TK = torch.stack([torch.randperm(E + 1)[:K] for _ in range(T)])
    weight_TK = torch.rand(T, K).double().requires_grad_()
    leaves = [x_TD, weight_TK, *experts.parameters()]
    ours = experts(x_TD, expert_TK, weight_TK)
    theirs = plain_loop(x_TD, expert_TK, torch.where(expert_TK < E, weight_TK, 0.0), experts)
    torch.testing.assert_close(ours, theirs, **tolerance[torch.float64])
    upstream = torch.randn_like(ours)
    for got, want in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, **tolerance[torch.float64])


def test_trap_a_token_is_projected_once_per_group(tiny_config, monkeypatch):
    experts = build_experts(tiny_config, group=3, rank=U)
    projected = []
    original = moe.experts.latent.looped_product

    def counting(rows, right, ends):
        if len(right) == 2:
            projected.append((len(rows), ends))
        return original(rows, right, ends)

    monkeypatch.setattr(moe.experts.latent, "looped_product", counting)
    expert_TK = torch.tensor([[0, 1, 2], [0, 3, 4], [5, 4, 3]])
    experts(torch.randn(3, D).double(), expert_TK, torch.ones(3, 3).double())
    assert projected == [(4, [2, 4])] * 2, "two tokens in each of two groups, gate and up"


def test_one_expert_after_the_other_computes_what_all_together_do(tiny_config):
    """Without a gradient, as offloaded experts are computed; empty slots are at both ends and in the middle."""
    experts = build_experts(tiny_config, group=4, rank=U)
    x_TD, weight_TK = torch.randn(T, D).double(), torch.rand(T, K).double()
    for expert_TK in (torch.randint(E + 1, (T, K)), torch.full((T, K), E), torch.tensor([[5, E], [E, 0]] * 10)):
        together = experts(x_TD, expert_TK, weight_TK)
        with torch.no_grad():
            torch.testing.assert_close(experts(x_TD, expert_TK, weight_TK), together)


def test_trap_down_projection_stays_full(tiny_config):
    experts = LatentExperts(tiny_config(), group=2, rank=U)
    assert experts.down_proj.shape == (E, D, F)
    assert experts.gate_up_proj.shape == (E, 2 * F, U)
    assert experts.gate_basis.shape == experts.up_basis.shape == (3, U, D)


def test_full_rank_with_identity_bases_is_the_plain_model(tiny_config, tolerance):
    plain = MoEForCausalLM(tiny_config()).double().eval()
    model = MoEForCausalLM(latent_config(tiny_config, group=3, rank=D)).double().eval()
    state = plain.state_dict()
    for name, value in model.state_dict().items():
        if name.endswith("_basis"):
            state[name] = torch.eye(D).double().expand(value.shape)
    model.load_state_dict(state)
    token_BS = torch.randint(96, (2, 9))
    torch.testing.assert_close(model(token_BS).logits, plain(token_BS).logits, **tolerance[torch.float64])


@pytest.mark.parametrize("rank", [5, 8])
@pytest.mark.parametrize("slots", [1, 2, 4, 6])
def test_offloaded_logits_are_the_resident_bits(tiny_config, tmp_path, slots, rank):
    model = MoEForCausalLM(latent_config(tiny_config, rank=rank)).eval()
    model.save_pretrained(tmp_path)
    loaded = offload.load(tmp_path, cache_experts=slots)
    token_BS = torch.randint(96, (2, 17))
    with torch.no_grad():
        assert torch.equal(loaded(token_BS).logits, model(token_BS).logits)
    assert torch.equal(
        loaded.generate(token_BS, max_new_tokens=4, do_sample=False),
        model.generate(token_BS, max_new_tokens=4, do_sample=False),
    )
    assert loaded.offload.report()["bytes_read"] > 0


def test_training_lowers_the_loss(tiny_config):
    model = MoEForCausalLM(latent_config(tiny_config, initializer_range=0.02))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    token_BS = torch.randint(96, (4, 16))
    losses = []
    for _ in range(20):
        loss = model(token_BS, labels=token_BS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"group": 7}, "group must lie in 1..6"),
        ({"rank": 33}, "rank must lie in 1..32"),
        ({"rank": 0}, "rank must lie in 1..32"),
        ({"ranks": 3}, "did you mean 'rank'"),
    ],
)
def test_bad_options_are_refused(tiny_config, options, reason):
    with pytest.raises(ValueError, match=reason):
        MoEForCausalLM(tiny_config(architecture="latent", architecture_options=options))
