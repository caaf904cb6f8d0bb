"""Dataset tasks for encoders with a classification, question-answering or embedding head."""

from dse.evaluation.heads.classification import ClassificationTask
from dse.evaluation.heads.embedding import EmbeddingTask
from dse.evaluation.heads.head_evaluator import HeadEvaluator
from dse.evaluation.heads.head_task import HeadTask
from dse.evaluation.heads.question_answering import QuestionAnsweringTask

__all__ = ["ClassificationTask", "EmbeddingTask", "HeadEvaluator", "HeadTask", "QuestionAnsweringTask"]
