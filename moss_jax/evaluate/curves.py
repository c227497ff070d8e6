"""Results of the layer-similarity analysis of one model: scores by layer, and the split that they suggest."""

from dataclasses import dataclass

import numpy as np

SCORES = ("match", "path")  # best speech position; best monotone path
CENTRES = ("raw", "centred")  # hidden states as they are; with the mean of the layer subtracted
PLATEAU = 0.9  # of the highest effect: the plateau ends at the last layer above this share. A convention, not tuned
Key = tuple[str, str, str]  # (block, one of CENTRES, one of SCORES)


@dataclass(frozen=True, eq=False)
class Curves:
    """Scores of one model.

    Attributes:
        name: of the model.
        scores: float32 [layers of the block, sentences] by key, of each sentence with its own text.
        floors: the same with equally long text of other sentences.
        heatmaps: {name of the sentence: {block: float32 [layers, codes, text positions]}}, centred cosines of the
            sentences for which they were requested.
    """

    name: str
    scores: dict[Key, np.ndarray]
    floors: dict[Key, np.ndarray]
    heatmaps: dict[str, dict[str, np.ndarray]]

    @property
    def blocks(self) -> list[str]:
        return list(dict.fromkeys(block for block, _, _ in self.scores))

    def effect(self, block: str, centre: str, score: str) -> np.ndarray:
        """Score above the floor, [layers, sentences]."""
        key = (block, centre, score)
        return self.scores[key] - self.floors[key]

    def depth(self) -> np.ndarray:
        """The centred path effect over the whole depth, [layers, sentences]: shared layers, then the branches' mean."""
        effects = {block: self.effect(block, "centred", "path") for block in self.blocks}
        if "text" not in effects:
            return effects["shared"]
        branches = (effects["text"] + effects["audio"]) / 2
        if "shared" not in effects:
            return branches
        return np.concatenate([effects["shared"], branches])

    def split(self) -> tuple[int, int] | None:
        """(last layer of the plateau, counted from 1; number of layers above it): a rule of thumb for the split.

        None where the highest effect is not significant, or does not fall again before the last layer.
        """
        if not self.is_significant():
            return None
        means = self.depth().mean(1)
        last = int(np.flatnonzero(means >= PLATEAU * means.max())[-1])
        above = len(means) - 1 - last
        return (last + 1, above) if above else None

    def is_significant(self) -> bool:
        """Whether the highest effect is above two standard errors over sentences."""
        effect = self.depth()
        best = effect[int(effect.mean(1).argmax())]
        return bool(best.mean() > 2 * best.std(ddof=1) / np.sqrt(len(best)))

    def verdict(self) -> str:
        """The result of `split` as a sentence."""
        if not self.is_significant():
            return "No effect stands out of the spread over sentences"
        split = self.split()
        if split is None:
            return "The effect does not fall again before the last layer"
        return f"The plateau ends after layer {split[0]}; {split[1]} layers are above it"
