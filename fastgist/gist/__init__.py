"""GIST (arXiv 2312.07255): a gist token in a model, and what comes out of it."""

from fastgist.gist.loss import divided, loss_of
from fastgist.gist.model import GistConfig, GistExtension, GistHost, GistInsert, GistModel, add_gist
from fastgist.gist.output import GistOutput
from fastgist.peft.files import register_extension

register_extension(GistExtension.name, GistConfig, add_gist)

__all__ = ["GistConfig", "GistHost", "GistInsert", "GistModel", "GistOutput", "add_gist", "divided", "loss_of"]
