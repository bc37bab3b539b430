"""DenseMixer, experts in a narrow space or choosing themselves, n-gram tables, multi-token prediction: by loops."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from moe import MoEForCausalLM, export
from routing import Carry, RoutingContext


def layer_of(tiny_config, **fields):
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(**fields)).double().model.moe_layers[0]


def expert(layer, e, x_TD):
    gate, up = (x_TD @ layer.experts.gate_up_proj[e].T).chunk(2, dim=-1)
    return (layer.experts.act_fn(gate) * up) @ layer.experts.down_proj[e].T


def expect_equal_gradients(ours, theirs, leaves, tolerance):
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad((ours * upstream).sum(), leaves)
    for a, b in zip(found, torch.autograd.grad((theirs * upstream).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_dense_mixer_is_sparse_forward_and_dense_for_the_router(tiny_config, tolerance):
    layer, plain = (layer_of(tiny_config, architecture=name) for name in ("dense_mixer", "moe"))
    x_TD, upstream = torch.randn(9, 32).double(), torch.randn(9, 32).double()
    context = RoutingContext(is_training=True)
    y_TD, _, _ = layer(x_TD, Carry(), context)
    sparse_TD, _, _ = plain(x_TD, Carry(), context)
    torch.testing.assert_close(y_TD, sparse_TD, **tolerance[torch.float64])
    ours = torch.autograd.grad((y_TD * upstream).sum(), [layer.router.weight, layer.experts.down_proj])
    (theirs,) = torch.autograd.grad((sparse_TD * upstream).sum(), [plain.experts.down_proj])
    torch.testing.assert_close(ours[1], theirs, **tolerance[torch.float64])
    # the router's gradient is that of a layer in which every expert's output counts with its probability
    probability_TE = (x_TD @ layer.router.weight.T).softmax(dim=-1)
    dense_TD = sum(probability_TE[:, e, None] * expert(layer, e, x_TD).detach() for e in range(6))
    (dense,) = torch.autograd.grad((dense_TD * upstream).sum(), [layer.router.weight])
    torch.testing.assert_close(ours[0], dense, **tolerance[torch.float64])
    with pytest.raises(ValueError, match="weights that are probabilities"):
        layer_of(tiny_config, architecture="dense_mixer", router="deepseek_v3")


def test_latent_moe_computes_experts_between_two_projections(tiny_config, tolerance):
    layer = layer_of(tiny_config, architecture="latent_moe", architecture_options={"width": 12}, router="qwen3_moe")
    x_TD = torch.randn(7, 32).double().requires_grad_()
    y_TD, _, _ = layer(x_TD, Carry(), RoutingContext())
    probability_TE = (x_TD @ layer.router.weight.T).softmax(dim=-1)
    best = probability_TE.topk(2)
    share_TK = best.values / best.values.sum(dim=1, keepdim=True)
    low_TD = x_TD @ layer.down.weight.T
    expected = torch.stack(
        [
            sum(w * expert(layer, e, low_TD[t]) for w, e in zip(share_TK[t], best.indices[t].tolist(), strict=True))
            for t in range(7)
        ]
    )
    expected = expected @ layer.up.weight.T
    torch.testing.assert_close(y_TD, expected, **tolerance[torch.float64])
    expect_equal_gradients(y_TD, expected, [x_TD, *layer.parameters()], tolerance[torch.float64])
    assert layer.experts.down_proj.shape == (6, 12, 24)
    with pytest.raises(ValueError, match=r"width must lie in 1\.\.32"):
        layer_of(tiny_config, architecture="latent_moe", architecture_options={"width": 33})


def test_autonomous_experts_are_chosen_by_the_norm_of_their_own_activation(tiny_config, tolerance):
    layer = layer_of(tiny_config, architecture="autonomous", architecture_options={"rank": 5})
    x_TD = torch.randn(7, 32).double().requires_grad_()
    y_TD, _, _ = layer(x_TD, Carry(), RoutingContext())
    experts, rows = layer.experts, []
    for x_D in x_TD:
        norm_E = torch.stack([(experts.low.weight[e] @ x_D).norm() for e in range(6)])
        best = norm_E.topk(2)
        parts = [
            experts.down_proj[e]
            @ (experts.act_fn(experts.high[e] @ (experts.low.weight[e] @ x_D)) * (experts.up_proj[e] @ x_D))
            for e in best.indices.tolist()
        ]
        rows.append(sum(w * part for w, part in zip(best.values.softmax(dim=0), parts, strict=True)))
    expected = torch.stack(rows)
    torch.testing.assert_close(y_TD, expected, **tolerance[torch.float64])
    weights = [experts.low.weight, experts.high, experts.up_proj, experts.down_proj, x_TD]
    expect_equal_gradients(y_TD, expected, weights, tolerance[torch.float64])


def test_multi_token_prediction_adds_a_loss_and_changes_no_logit(tiny_config):
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(mtp_depth=2, balance_loss_weight=0.0, z_loss_weight=0.0)).train()
    token_BS = torch.randint(96, (2, 9))
    output = model(token_BS, labels=token_BS)
    state, embedded, losses = model.model(token_BS)[0].x_BSD, model.model.embed_tokens(token_BS), []
    for depth, block in enumerate(model.mtp.blocks, start=1):
        length = 9 - depth
        joined = torch.cat([block.state_norm(state[:, :length]), block.token_norm(embedded[:, depth:])], dim=-1)
        inputs = model.mtp._inputs(state[:, :length], None)
        state = block.layer(block.joint(joined), Carry(), inputs)[0]
        logits = model.lm_head(block.norm(state))
        wanted = token_BS[:, depth + 1 :]
        losses.append(cross_entropy(logits[:, : wanted.shape[1]].flatten(0, 1), wanted.flatten()))
    torch.testing.assert_close(output.loss, output.lm_loss + 0.1 * torch.stack(losses).mean())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.mtp.parameters())

    plain = MoEForCausalLM(tiny_config()).eval()
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if not name.startswith("mtp.")})
    with torch.no_grad():
        assert torch.equal(plain(token_BS).logits, model.eval()(token_BS).logits)
    with pytest.raises(ValueError, match="mtp_depth must be a whole number"):
        tiny_config(mtp_depth=-1)


def test_a_later_token_never_reaches_an_earlier_prediction(tiny_config):
    model = MoEForCausalLM(tiny_config(mtp_depth=1)).eval()
    token_BS = torch.randint(96, (1, 9))
    changed = token_BS.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 96
    states = []
    for ids in (token_BS, changed):
        state, embedded = model.model(ids)[0].x_BSD, model.model.embed_tokens(ids)
        states.append(model.mtp.blocks[0](state[:, :8], embedded[:, 1:], model.mtp._inputs(state[:, :8], None)))
    # the state at position t has read tokens up to t + 1, and predicts token t + 2
    assert torch.equal(states[0][:, :5], states[1][:, :5])
    assert not torch.equal(states[0][:, 5], states[1][:, 5])


def test_exports_do_without_the_multi_token_head(tiny_config):
    model = MoEForCausalLM(tiny_config(mtp_depth=1, router="qwen3_moe")).eval()
    assert not any(name.startswith("mtp") for name in export(model, "qwen3_moe").state_dict())


def test_n_gram_tables_read_rows_of_the_last_tokens_and_nothing_else(tiny_config, tolerance):
    options = {"layers": [1], "rows": 61, "width": 6, "heads": 2}
    layer = (
        MoEForCausalLM(tiny_config(architecture="engram", architecture_options=options)).double().model.moe_layers[1]
    )
    tables, token_T = layer.tables, torch.tensor([5, 9, 5, 9, 7, 5, 9])
    sequence_T = torch.tensor([0, 0, 0, 0, 0, 0, 0])
    context = RoutingContext(token_id_T=token_T, sequence_T=sequence_T)
    row_TN = tables.row_TN(context)
    factors = tables.factor_NJ.tolist()
    for t, rows in enumerate(row_TN.tolist()):
        for number, row in enumerate(rows):
            length = 2 if number < 2 else 3
            gram = [int(token_T[t - back]) + 1 if t >= back else 0 for back in range(length)]
            total = sum(token * factor for token, factor in zip(gram, factors[number][:length], strict=True))
            assert row == number * 61 + (total ^ (total >> 17)) % 61
    assert torch.equal(row_TN[3, :2], row_TN[6, :2]), "the same two tokens"
    assert not torch.equal(row_TN[3], row_TN[6])
    x_TD = torch.randn(7, 32).double().requires_grad_()
    plain_TD, _, _ = super(type(layer), layer).forward(x_TD, Carry(), context)
    read = torch.stack([torch.cat([tables.table[row] for row in rows]) for rows in row_TN.tolist()])
    key, token = tables.key_norm(read @ tables.key.weight.T), tables.token_norm(x_TD)
    gate = torch.sigmoid((key * token).sum(dim=1) / 32**0.5)
    expected = plain_TD + gate[:, None] * (read @ tables.value.weight.T)
    found_TD, _, _ = layer(x_TD, Carry(), context)
    torch.testing.assert_close(found_TD, expected, **tolerance[torch.float64])
    expect_equal_gradients(found_TD, expected, [x_TD, *layer.parameters()], tolerance[torch.float64])
    with pytest.raises(ValueError, match=r"0\.\.2; got \[3\]"):
        layer_of(tiny_config, architecture="engram", architecture_options={"layers": [3]})


def test_padding_before_a_text_is_no_token_of_it(tiny_config):
    options = {"layers": [0], "rows": 61, "width": 6, "heads": 2}
    model = MoEForCausalLM(tiny_config(architecture="engram", architecture_options=options)).double().eval()
    token_BS = torch.randint(96, (1, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    padded = torch.cat([torch.full((1, 2), 7), token_BS], dim=1)
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits[:, 2:]
        torch.testing.assert_close(found, model(token_BS).logits)
