"""Lightning callbacks that every model of this package trains with."""

from anomalib_dskd.models.distillation.callbacks.caching import CacheTrainingData
from anomalib_dskd.models.distillation.callbacks.evaluation_weights import EvaluationWeights
from anomalib_dskd.models.distillation.callbacks.image_checks import CheckImageFiles
from anomalib_dskd.models.distillation.callbacks.memory import ReleaseMemory
from anomalib_dskd.models.distillation.callbacks.predictions import ReportPredictions
from anomalib_dskd.models.distillation.callbacks.seeding import SeedTraining

__all__ = [
    "CacheTrainingData",
    "CheckImageFiles",
    "EvaluationWeights",
    "ReleaseMemory",
    "ReportPredictions",
    "SeedTraining",
]
