"""A Llama with experts in plain PyTorch: slow, obvious, fp64, without packs, ranks or Megatron-Core.

Weights have Megatron-Core's names. The objective is the mean token loss, plus the losses of the routers, each times its
coefficient: their mean over micro-batches, summed over layers.
"""

import torch
import torch.nn.functional as F


def gradients(weights, micro_batches, network, coefficients, score="softmax"):
    """Compute objective, router losses by layer (without coefficients), and the gradient of every weight.

    Args:
        weights: by name, of the whole model.
        micro_batches: ``Batch`` of numpy arrays, all of a step, of all ranks.
        network: ``NetworkArguments``.
        coefficients: of any of ``aux_loss``, ``seq_aux_loss``, ``global_aux_loss``, ``z_loss``.
        score: ``--moe-router-score-function``.
    """
    weights = {name: value.double().requires_grad_() for name, value in weights.items()}
    supervised = sum(int(batch.loss_mask_BS.sum()) for batch in micro_batches)
    total, by_layer = 0.0, {name: torch.zeros(network.num_layers) for name in coefficients}
    for batch in micro_batches:
        token_losses, logits_of_layers = forward(weights, batch, network, score)
        total = total + (token_losses * torch.from_numpy(batch.loss_mask_BS).flatten()).sum() / supervised
        for layer, logits in logits_of_layers.items():
            for name, coefficient in coefficients.items():
                value = router_loss(name, logits, rows_of(batch), network.moe_router_topk, score) / len(micro_batches)
                total = total + coefficient * value
                by_layer[name][layer] += value.item()
    names = list(weights)
    gradients_of_total = torch.autograd.grad(total, [weights[name] for name in names])
    return total.item(), by_layer, dict(zip(names, gradients_of_total, strict=True))


def rows_of(batch):
    """Indices in the stream of each row's real tokens."""
    width = batch.tokens_BS.shape[1]
    return [list(range(row * width, row * width + int(n))) for row, n in enumerate(batch.lengths_B)]


def router_loss(name, logits, rows, topk, score="softmax"):
    """A loss of one micro-batch and one layer; ``logits`` [T, experts], ``rows``: token indices of each row."""
    if name == "z_loss":
        return sum(logits[row].logsumexp(-1).square().mean() for row in rows) / len(rows)
    if name == "seq_aux_loss":
        return sum(balancing_loss(logits[row], topk, score) for row in rows) / len(rows)
    return balancing_loss(logits[[index for row in rows for index in row]], topk, score)


def balancing_loss(logits, topk, score="softmax"):
    """E Σ_e f_e P_e, with the fraction f_e of choices of expert e and its mean probability P_e."""
    experts = logits.shape[1]
    if score == "softmax":
        probabilities = logits.softmax(-1)
    else:
        probabilities = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    choices = logits.topk(topk).indices.flatten()
    fractions = torch.bincount(choices, minlength=experts) / len(choices)
    return experts * (fractions * probabilities.mean(0)).sum()


def forward(weights, batch, network, score):
    """Token losses [T], and the router's logits [T, experts] of each layer with experts."""
    tokens, labels, positions, samples = (
        torch.from_numpy(values).flatten()
        for values in (batch.tokens_BS, batch.labels_BS, batch.position_ids_BS, batch.sample_ids_BS)
    )
    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    sees = causal & (samples[:, None] == samples[None])
    hidden, logits_of_layers = weights["embedding.word_embeddings.weight"][tokens], {}
    for layer in range(network.num_layers):
        of_layer = {
            name.removeprefix(f"decoder.layers.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        normed = norm(hidden, of_layer["input_layernorm.weight"], network)
        hidden = hidden + attention(of_layer, normed, positions, sees, network)
        normed = norm(hidden, of_layer["pre_mlp_layernorm.weight"], network)
        if "mlp.router.weight" not in of_layer:
            hidden = hidden + mlp(normed, of_layer["mlp.linear_fc1.weight"], of_layer["mlp.linear_fc2.weight"])
            continue
        update, logits_of_layers[layer] = experts(of_layer, normed, network, score)
        hidden = hidden + update
    hidden = norm(hidden, weights["decoder.final_layernorm.weight"], network)
    logits = hidden @ weights["output_layer.weight"].T
    return F.cross_entropy(logits, labels, reduction="none"), logits_of_layers


def norm(hidden, weight, network):
    """RMSNorm: [T, hidden] -> [T, hidden]."""
    return hidden * (hidden.square().mean(-1, keepdim=True) + network.norm_epsilon).rsqrt() * weight


def attention(weights, hidden, positions, sees, network):
    """Grouped-query attention of the pairs in ``sees`` [T, T]: [T, hidden] -> [T, hidden]."""
    groups, size = network.num_query_groups, network.kv_channels
    queries = network.num_attention_heads // groups
    mixed = (hidden @ weights["self_attention.linear_qkv.weight"].T).view(len(hidden), groups, queries + 2, size)
    query, key, value = mixed.split([queries, 1, 1], dim=2)
    query, key = rotate(query, positions, network), rotate(key, positions, network)
    scores = torch.einsum("tghd,sgd->ghts", query, key.squeeze(2)) / size**0.5
    parts = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    output = torch.einsum("ghts,sgd->tghd", parts, value.squeeze(2)).reshape(len(hidden), -1)
    return output @ weights["self_attention.linear_proj.weight"].T


def rotate(heads, positions, network):
    """Rotary embedding of [T, groups, heads, d]."""
    size = network.kv_channels
    frequencies = network.rotary_base ** (-torch.arange(0, size, 2).double() / size)
    angles = (positions[:, None] * frequencies).repeat(1, 2)[:, None, None]
    first, second = heads.chunk(2, dim=-1)
    return heads * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def mlp(hidden, fc1, fc2):
    """SwiGLU: [T, hidden] -> [T, hidden]."""
    gate, up = (hidden @ fc1.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ fc2.T


def experts(weights, hidden, network, score):
    """Sum of the chosen experts' outputs and of the shared one's, [T, hidden], and the router's logits."""
    logits = hidden @ weights["mlp.router.weight"].T
    best, chosen = logits.topk(network.moe_router_topk)
    factors = best.softmax(-1) if score == "softmax" else best.sigmoid() / best.sigmoid().sum(-1, keepdim=True)
    update = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for factor, expert in zip(factors[token], chosen[token].tolist(), strict=True):
            name = f"mlp.experts.local_experts.{expert}.linear_fc"
            part = mlp(hidden[token : token + 1], weights[f"{name}1.weight"], weights[f"{name}2.weight"])
            update = update.index_add(0, torch.tensor([token]), factor * part)
    if "mlp.shared_experts.linear_fc1.weight" in weights:
        shared = mlp(
            hidden, weights["mlp.shared_experts.linear_fc1.weight"], weights["mlp.shared_experts.linear_fc2.weight"]
        )
        if "mlp.shared_experts.gate_weight" in weights:
            shared = shared * (hidden @ weights["mlp.shared_experts.gate_weight"].T).sigmoid()
        update = update + shared
    return update, logits
