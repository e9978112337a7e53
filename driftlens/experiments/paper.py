"""What the SADR paper (Wang et al., ICLR 2025) reports: its table 3."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line of table 3, in per cent but for FL.

    Args:
        model: The edited model.
        editor: Lower case; ``"none"`` for the model before the edit.
        sadr: Whether with SADR.
        average: Avg. S as printed: the harmonic mean of ES, PS, NS, RS and DNS.
        ES: Edit success.
        PS: Paraphrase success.
        NS: Neighbourhood success.
        RS: Relation success.
        DNS: Distract neighbourhood success.
        FL: Fluency, entropy of n-grams times 100.
    """

    model: str
    editor: str
    sadr: bool
    average: float
    ES: float
    PS: float
    NS: float
    RS: float
    DNS: float
    FL: float


TABLE_3 = (
    Row("GPT-J 6B", "none", False, 34.43, 20.86, 17.70, 82.43, 79.73, 61.99, 621.96),
    Row("GPT-J 6B", "rome", False, 33.56, 99.88, 99.58, 80.26, 11.94, 30.42, 620.58),
    Row("GPT-J 6B", "rome", True, 57.74, 99.76, 96.36, 80.86, 27.75, 49.35, 623.00),
    Row("GPT-J 6B", "memit", False, 51.07, 99.64, 95.47, 81.42, 25.78, 38.00, 622.71),
    Row("GPT-J 6B", "memit", True, 60.23, 99.52, 93.21, 81.44, 34.68, 47.35, 623.60),
    Row("GPT-J 6B", "pmet", False, 52.98, 99.40, 92.67, 81.49, 27.68, 39.79, 621.18),
    Row("GPT-J 6B", "pmet", True, 59.06, 99.11, 89.09, 81.44, 33.33, 47.47, 622.18),
    Row("Llama-3 8B", "none", False, 19.99, 9.36, 9.48, 87.17, 92.66, 64.25, 617.19),
    Row("Llama-3 8B", "rome", False, 58.54, 99.88, 99.52, 82.19, 29.38, 52.21, 617.23),
    Row("Llama-3 8B", "rome", True, 70.99, 99.82, 96.90, 83.18, 47.67, 58.51, 618.39),
    Row("Llama-3 8B", "memit", False, 40.90, 99.94, 99.52, 82.52, 17.44, 30.55, 605.99),
    Row("Llama-3 8B", "memit", True, 63.12, 99.82, 98.87, 82.96, 35.38, 45.57, 618.38),
    Row("Llama-3 8B", "pmet", False, 43.87, 99.58, 99.40, 81.10, 19.84, 32.12, 610.65),
    Row("Llama-3 8B", "pmet", True, 61.88, 99.28, 97.02, 82.86, 34.68, 51.22, 617.91),
    Row("GPT-NeoX 20B", "none", False, 31.87, 17.04, 17.64, 80.62, 83.76, 58.34, 619.25),
    Row("GPT-NeoX 20B", "rome", False, 23.45, 99.94, 98.75, 72.67, 15.11, 8.84, 579.82),
    Row("GPT-NeoX 20B", "rome", True, 54.81, 99.76, 96.13, 73.96, 34.89, 34.95, 619.54),
    Row("GPT-NeoX 20B", "memit", False, 40.32, 99.88, 90.46, 77.45, 35.24, 16.22, 615.19),
    Row("GPT-NeoX 20B", "memit", True, 45.26, 97.38, 89.21, 77.45, 45.48, 18.49, 621.59),
    Row("GPT-NeoX 20B", "pmet", False, 19.97, 99.52, 95.23, 74.18, 12.29, 7.41, 510.25),
    Row("GPT-NeoX 20B", "pmet", True, 31.16, 99.40, 93.09, 75.33, 24.86, 11.61, 589.76),
)
