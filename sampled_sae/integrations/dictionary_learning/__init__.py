"""dictionary_learning with this package's training step: change the import of a trainer, keep `trainSAE`.

`BatchTopKTrainer`, `TopKTrainer` and `MatryoshkaBatchTopKTrainer` take the arguments of the trainers of those names and
give their losses;
`SampledTrainer` has the candidate pool too. What `trainSAE` saves, `load_dictionary` reads.
"""

from .dictionaries import AutoEncoderTopK, BatchTopKSAE
from .matryoshka import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
from .trainers import BatchTopKTrainer, SampledTrainer, TopKTrainer

__all__ = [
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE",
    "MatryoshkaBatchTopKTrainer",
    "SampledTrainer",
    "TopKTrainer",
]
