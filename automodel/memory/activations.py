"""What autograd keeps of a layer, and what its backward pass needs besides, by formulas.

Each is read off the code that it is about: ours off `kernels`, `moe` and what torch.compile keeps, transformers' off
its modules. `tests/automodel/test_memory.py` compares transformers' with what autograd saves, and the peaks with those
measured on H200. What is less than a thousandth is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from automodel.memory.sizes import Checkpointing, Implementation, Sizes
from ckpt_tools.engine.sharding import ShardingMesh

LOSS_CHUNK_BYTES = 1600 << 20
"""Logits that exist at one time in our loss (`kernels/cross_entropy.py`)."""

KEPT_LOAD = 2
"""Divided experts keep their first projection where the worst case is up to so many even loads (`moe/symmetric.py`)."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one process's activations.

    Attributes:
        sizes: of its layers and tokens.
        mesh: over which experts are divided.
        implementation: whose layers.
        checkpointing: layers keep their input alone, or less of attention.
    """

    sizes: Sizes
    mesh: ShardingMesh
    implementation: Implementation
    checkpointing: Checkpointing

    def kept(self, layer: int) -> int:
        """From forward to backward, by a layer."""
        return self._saved(layer) - self._again(layer)

    def working(self, layer: int) -> int:
        """In the backward pass of a layer, beside what it kept."""
        return self._again(layer) + max(self._attention_backward, self._mlp_backward(layer))

    def _again(self, layer: int) -> int:
        """What is not kept, but made again in the backward pass."""
        if self.checkpointing == "selective":
            z = self.sizes
            # The norm; the projection; rotated queries and keys, values. The attention's output and sums are kept.
            return z.n * z.s * (z.d + 2 * (z.query + 2 * z.key_value))
        return self._saved(layer) - self.input if self.checkpointing else 0

    @property
    def input(self) -> int:
        """Of a layer: hidden states."""
        return self.sizes.n * self.sizes.d * self.sizes.s

    @property
    def head(self) -> int:
        """Head and loss, at their peak."""
        z = self.sizes
        if self.implementation == "native":
            # Gradients of hidden states and head (FP32 for several chunks), and a chunk of logits; then the head's
            # gradient once more, in its own dtype.
            logits = z.n * z.v * z.s
            saved = z.v * z.d * (4 if logits > LOSS_CHUNK_BYTES else z.s)
            return self.input + saved + max(min(logits, LOSS_CHUNK_BYTES), self.head_gradient)
        # transformers' loss in FP32: the log-softmax, its gradient, and the gradient of the logits.
        return 3 * 4 * z.n * z.v

    @property
    def head_gradient(self) -> int:
        return self.sizes.v * self.sizes.d * self.sizes.s

    def _saved(self, layer: int) -> int:
        is_sparse = self.sizes.kinds[layer] == "moe"
        return self.sizes.n * (self._attention + (self._experts if is_sparse else self._dense))

    @property
    def _attention(self) -> int:
        """Bytes a token of attention, both norms and residuals."""
        z = self.sizes
        if self.implementation == "transformers":
            # Each of four norms in FP32 and rounded; hidden ones weighted, too; rotated queries and keys, values,
            # output; log-sum-exps and the norms' factors.
            norms = 2 * (4 + 2 * z.s) * z.d + 8
            heads = (4 + 3 * z.s) * (z.query + z.key_value)
            return norms + heads + 8 * z.heads + 4 * z.heads * z.key_value // z.query
        # Compiled: input, residual and their norms; the projection; rotated queries and keys, values; output; sums.
        return z.s * (4 * z.d + 2 * (z.query + 2 * z.key_value) + z.query) + 4 * z.heads

    @property
    def _dense(self) -> int:
        """Bytes a token of a gated MLP: gate and up, their product; uncompiled, the activated gate, too."""
        return self.sizes.s * self.sizes.dense_width * (4 if self.implementation == "transformers" else 3)

    @property
    def _experts(self) -> int:
        """Bytes a token of router and experts."""
        z = self.sizes
        if self.implementation != "native":
            # Gathered rows, gate and up, (activated gate,) product, rows again; three orders and the weights.
            widths = 4 if self.implementation == "transformers" else 3
            return z.s * z.k * (2 * z.d + widths * z.width) + (24 + z.s) * z.k + 4 * z.e + 12 * z.k + 4
        router = (4 + z.s) * z.e + 12 * z.k
        if self.mesh.ep == 1:
            # The first projection; weights by row, and three orders.
            return z.s * z.k * 2 * z.width + 28 * z.k + router
        # Tokens of the others as they came; the first projection of the worst case; where rows are, and their weights.
        projected = self._rows * 2 * z.width * z.s // z.n if self._keeps_projected else 0
        return (self.mesh.ep - 1) * z.d * z.s + projected + 4 * self.mesh.ep * z.k + 4 * self._rows // z.n + router

    @property
    def _rows(self) -> int:
        """Rows of a process's experts: all choices; over processes, as many as can come at worst."""
        z, ep = self.sizes, self.mesh.ep
        return z.n * z.k if ep == 1 or self.implementation != "native" else ep * z.n * min(z.k, -(-z.e // ep))

    @property
    def _keeps_projected(self) -> bool:
        return self._rows <= KEPT_LOAD * self.sizes.n * self.sizes.k

    @property
    def _attention_backward(self) -> int:
        """Gradients of the output, of queries, keys and values twice, and of hidden states twice."""
        z = self.sizes
        return z.n * z.s * (z.query + 2 * (z.query + 2 * z.key_value) + 2 * z.d)

    def _mlp_backward(self, layer: int) -> int:
        z = self.sizes
        if z.kinds[layer] != "moe":
            return z.n * z.s * (3 * z.dense_width + 2 * z.d)
        row = z.s * self._rows
        if self.implementation != "native":
            # Gradients of the weighted rows and of the rows; then those of the products with their inputs.
            return row * max(3 * z.d, 2 * z.d + 3 * z.width)
        again = 2 * z.width if self.mesh.ep > 1 and not self._keeps_projected else 0
        # Gradients of the rows, of what was activated, of the projection, and what was activated; then those of the
        # projection and of the rows, and the rows again.
        return row * (again + max(z.d + 4 * z.width, 2 * z.d + 2 * z.width))
