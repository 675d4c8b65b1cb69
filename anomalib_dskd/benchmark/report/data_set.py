"""Results of a benchmark on one data set, and the paper's results on it."""

from collections.abc import Iterable
from dataclasses import dataclass

from anomalib_dskd.benchmark.job_result import JobResult
from anomalib_dskd.benchmark.report import paper
from anomalib_dskd.benchmark.report.tables import IN_PAPER, Quantity, summarize

__all__ = ["DataSet"]


@dataclass(frozen=True)
class DataSet:
    """All results of one data set."""

    name: str
    results: list[JobResult]

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order of their first results."""
        return list(dict.fromkeys(result.model for result in self.results))

    @property
    def categories(self) -> list[str | None]:
        """Categories of the data set, or only None."""
        return list(dict.fromkeys(result.category for result in self.results))

    @property
    def done(self) -> list[JobResult]:
        """Results of the jobs that did not fail."""
        return [result for result in self.results if result.status == "done"]

    @property
    def benchmark(self) -> paper.Benchmark | None:
        """The paper's results on this data set."""
        return paper.find_benchmark(self.name)

    def of(self, model: str) -> list[JobResult]:
        """Return the results of a model."""
        return [result for result in self.results if result.model == model]

    def by_model(self, results: Iterable[JobResult]) -> list[list[JobResult]]:
        """Group results by model, in the order of ``models``."""
        results = list(results)
        return [[result for result in results if result.model == model] for model in self.models]

    def method(self, model: str) -> str | None:
        """Return the paper's method that a model implements, if any."""
        first = self.of(model)[0]
        return paper.find_method(first.class_path, first.init_args)

    def ablation(self, model: str) -> paper.Ablation | None:
        """Return the paper's ablation that a model corresponds to, if any."""
        first = self.of(model)[0]
        return paper.find_ablation(first.class_path, first.init_args)

    def paper_result(self, model: str, quantity: Quantity, category: str | None) -> float | None:
        """Return the paper's result of a model on one category."""
        if self.benchmark is None or category is None or quantity not in IN_PAPER:
            return None
        return self.benchmark.result(self.method(model), quantity.name, category)

    def paper_mean(self, model: str, quantity: Quantity) -> float | None:
        """Return the paper's mean over the model's categories; for an ablation, the paper has only that over all."""
        if self.benchmark is None or quantity not in IN_PAPER:
            return None
        categories = summarize(self.of(model), quantity).categories - {""}
        mean = self.benchmark.mean(self.method(model), quantity.name, categories)
        ablation = self.ablation(model)
        if mean is None and ablation and self.benchmark is paper.MVTEC_AD:
            is_complete = categories == self.benchmark.all_categories
            return ablation.results[IN_PAPER.index(quantity)] if is_complete else None
        return mean
