"""A Llama with experts, written out in plain PyTorch: slow, obvious, fp64, without packs, ranks or Megatron-Core.

Weights go by Megatron-Core's names. The objective is the mean token loss, plus the losses of the routers, each times
its coefficient: their mean over micro-batches, added up over layers.
"""

import torch
import torch.nn.functional as F


def gradients(weights, micro_batches, network, coefficients, score="softmax"):
    """Objective, router losses by layer (without coefficients), and the gradient of every weight.

    Args:
        weights: by name, of a whole model.
        micro_batches: ``Batch`` of arrays, of all ranks and the whole step.
        network: ``NetworkArguments``.
        coefficients: of ``aux_loss``, ``seq_aux_loss``, ``global_aux_loss``, ``z_loss``, as far as there are any.
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
    found = torch.autograd.grad(total, [weights[name] for name in names])
    return total.item(), by_layer, dict(zip(names, found, strict=True))


def rows_of(batch):
    """The places of the real tokens of each row in the stream."""
    width = batch.tokens_BS.shape[1]
    return [list(range(row * width, row * width + int(n))) for row, n in enumerate(batch.lengths_B)]


def router_loss(name, logits, rows, topk, score="softmax"):
    """By the book, of one micro-batch and one layer."""
    if name == "z_loss":
        return sum(logits[row].logsumexp(-1).square().mean() for row in rows) / len(rows)
    if name == "seq_aux_loss":
        return sum(balancing_loss(logits[row], topk, score) for row in rows) / len(rows)
    return balancing_loss(logits[[place for row in rows for place in row]], topk, score)


def balancing_loss(logits, topk, score="softmax"):
    """E Σ_e f_e P_e: the part of choices that fell on expert e, and the mean probability of it."""
    experts = logits.shape[1]
    if score == "softmax":
        probabilities = logits.softmax(-1)
    else:
        probabilities = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    choices = logits.topk(topk).indices.flatten()
    fractions = torch.bincount(choices, minlength=experts) / len(choices)
    return experts * (fractions * probabilities.mean(0)).sum()


def forward(weights, batch, network, score):
    """Token losses [T], and the router's logits [T, experts] of each layer that has any."""
    tokens, labels, positions, samples = (
        torch.from_numpy(values).flatten()
        for values in (batch.tokens_BS, batch.labels_BS, batch.position_ids_BS, batch.sample_ids_BS)
    )
    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    sees = causal & (samples[:, None] == samples[None])
    hidden, logits_of_layers = weights["embedding.word_embeddings.weight"][tokens], {}
    for layer in range(network.num_layers):
        own = {
            name.removeprefix(f"decoder.layers.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        normed = norm(hidden, own["input_layernorm.weight"], network)
        hidden = hidden + attention(own, normed, positions, sees, network)
        normed = norm(hidden, own["pre_mlp_layernorm.weight"], network)
        if "mlp.router.weight" not in own:
            hidden = hidden + mlp(normed, own["mlp.linear_fc1.weight"], own["mlp.linear_fc2.weight"])
            continue
        update, logits_of_layers[layer] = experts(own, normed, network, score)
        hidden = hidden + update
    hidden = norm(hidden, weights["decoder.final_layernorm.weight"], network)
    logits = hidden @ weights["output_layer.weight"].T
    return F.cross_entropy(logits, labels, reduction="none"), logits_of_layers


def norm(hidden, weight, network):
    return hidden * (hidden.square().mean(-1, keepdim=True) + network.norm_epsilon).rsqrt() * weight


def attention(own, hidden, positions, sees, network):
    groups, size = network.num_query_groups, network.kv_channels
    of_group = network.num_attention_heads // groups
    mixed = (hidden @ own["self_attention.linear_qkv.weight"].T).view(len(hidden), groups, of_group + 2, size)
    query, key, value = mixed.split([of_group, 1, 1], dim=2)
    query, key = rotate(query, positions, network), rotate(key, positions, network)
    scores = torch.einsum("tghd,sgd->ghts", query, key.squeeze(2)) / size**0.5
    parts = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    output = torch.einsum("ghts,sgd->tghd", parts, value.squeeze(2)).reshape(len(hidden), -1)
    return output @ own["self_attention.linear_proj.weight"].T


def rotate(heads, positions, network):
    size = network.kv_channels
    frequencies = network.rotary_base ** (-torch.arange(0, size, 2).double() / size)
    angles = (positions[:, None] * frequencies).repeat(1, 2)[:, None, None]
    first, second = heads.chunk(2, dim=-1)
    return heads * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def mlp(hidden, fc1, fc2):
    gate, up = (hidden @ fc1.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ fc2.T


def experts(own, hidden, network, score):
    logits = hidden @ own["mlp.router.weight"].T
    best, chosen = logits.topk(network.moe_router_topk)
    factors = best.softmax(-1) if score == "softmax" else best.sigmoid() / best.sigmoid().sum(-1, keepdim=True)
    update = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for factor, expert in zip(factors[token], chosen[token].tolist(), strict=True):
            name = f"mlp.experts.local_experts.{expert}.linear_fc"
            part = mlp(hidden[token : token + 1], own[f"{name}1.weight"], own[f"{name}2.weight"])
            update = update.index_add(0, torch.tensor([token]), factor * part)
    if "mlp.shared_experts.linear_fc1.weight" in own:
        shared = mlp(hidden, own["mlp.shared_experts.linear_fc1.weight"], own["mlp.shared_experts.linear_fc2.weight"])
        if "mlp.shared_experts.gate_weight" in own:
            shared = shared * (hidden @ own["mlp.shared_experts.gate_weight"].T).sigmoid()
        update = update + shared
    return update, logits
