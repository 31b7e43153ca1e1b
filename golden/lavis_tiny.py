"""A tiny random BLIP-2 made of LAVIS' own classes, shared by the LAVIS goldens.

The LAVIS sources are imported from a checkout given by the caller; nothing of
them is kept here. Only the Q-Former, the stage-1 model and the stage-2 model are
wanted, so packages they import but never use at these sizes are replaced by
empty stand-ins. The image encoder is the identity: "images" are features.

Run as a script it writes blip2_tiny.safetensors, the weights all LAVIS goldens use.
"""

import importlib.machinery
import os
import sys
import types
from unittest.mock import MagicMock

import torch
from torch import nn

from common import arguments, versions, write_tensors

COMMIT = "506965b9c4a18c1e565bd32acaccabe0198433f7"
SEED = 20260
CONFIG = dict(hidden_size=36, num_hidden_layers=4, num_attention_heads=4, intermediate_size=60, vocab_size=97,
              max_position_embeddings=40, cross_attention_freq=3, query_length=5, encoder_width=22,
              embed_dim=10, max_txt_len=12, layer_norm_eps=1e-12, ln_vision_eps=1e-5)
PAD, CLS, SEP, DEC = 0, 1, 2, 97
IMAGE_TOKENS = 7
STAND_INS = ("timm", "fairscale", "omegaconf", "iopath", "torchvision", "decord", "cv2", "webdataset", "spacy", "pandas")


class StandIn(types.ModuleType):
    """An importable module whose every attribute is a mock."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class StandInFinder:
    """Serves a StandIn for each package of STAND_INS and anything below it."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        module.__path__ = []


def import_lavis(root):
    """Make `lavis.*` importable from a checkout without running any package __init__."""
    sys.meta_path.insert(0, StandInFinder())
    for name in ("lavis", "lavis.common", "lavis.models", "lavis.models.blip2_models", "lavis.models.blip_models"):
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(root, *name.split("."))]
        sys.modules[name] = package
    torch.distributed.get_rank = lambda *_: 0
    torch.distributed.get_world_size = lambda *_: 1
    # The registry looks this class up in the package itself.
    from lavis.models.base_model import BaseModel

    sys.modules["lavis.models"].BaseModel = BaseModel


class Tokens:
    """What a tokenizer returns: ids and mask, with a `.to` that stays on the CPU."""

    def __init__(self, ids, mask):
        self.input_ids, self.attention_mask = ids, mask

    def to(self, _device):
        return self


class IdTokenizer:
    """Takes lists of ids instead of strings; adds [CLS]/[SEP], cuts and pads as BERT's does."""

    bos_token_id, pad_token_id = DEC, PAD

    def __len__(self):
        return CONFIG["vocab_size"] + 1

    def __call__(self, texts, max_length, **_):
        ids = torch.full((len(texts), max_length), PAD)
        for row, text in zip(ids, texts):
            text = [CLS, *text[: max_length - 2], SEP]
            row[: len(text)] = torch.tensor(text)
        return Tokens(ids, (ids != PAD).long())


class Identity(nn.Module):
    """The image encoder: its input already is the feature sequence."""

    num_features = CONFIG["encoder_width"]

    def forward(self, x):
        return x

    def get_num_layer(self, _name=""):
        return 0


def tiny_parts(root):
    """Mixin that gives LAVIS' models the tiny tokenizer, encoder and Q-Former."""
    import_lavis(root)
    from lavis.models.blip2_models import Qformer, blip2

    class TinyParts:
        @classmethod
        def init_tokenizer(cls, *_):
            return IdTokenizer()

        def init_vision_encoder(self, *_):
            return Identity(), blip2.LayerNorm(CONFIG["encoder_width"])

        @classmethod
        def init_Qformer(cls, *_):
            keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
                    "max_position_embeddings", "cross_attention_freq", "query_length", "encoder_width", "layer_norm_eps")
            config = Qformer.BertConfig(**{k: CONFIG[k] for k in keys}, add_cross_attention=True, pad_token_id=PAD,
                                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            return Qformer.BertLMHeadModel(config), nn.Parameter(torch.zeros(1, CONFIG["query_length"], CONFIG["hidden_size"]))

    return TinyParts


def randomise(model, seed):
    """Overwrite every parameter with seeded noise large enough that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "temp":
            continue
        if "LayerNorm.weight" in name or name == "ln_vision.weight":
            parameter.data = 1 + 0.2 * noise
        elif name.endswith("bias"):
            parameter.data = 0.1 * noise
        elif "embeddings" in name or name == "query_tokens":
            parameter.data = 0.5 * noise
        else:
            parameter.data = noise * 1.2 / parameter.shape[-1] ** 0.5


def stage1_model(root):
    """LAVIS' Blip2Qformer at the tiny sizes, all weights random, ready for training."""
    parts = tiny_parts(root)
    from lavis.models.blip2_models import blip2_qformer

    class Tiny(parts, blip2_qformer.Blip2Qformer):
        pass

    torch.manual_seed(SEED)
    model = Tiny(num_query_token=CONFIG["query_length"], cross_attention_freq=CONFIG["cross_attention_freq"],
                 embed_dim=CONFIG["embed_dim"], max_txt_len=CONFIG["max_txt_len"])
    randomise(model, SEED)
    return model.train()


def drop_text_branch(model):
    """What the constructors of LAVIS' stage-2 models do with a Q-Former whose queries alone are used."""
    model.Qformer.cls = None
    model.Qformer.bert.embeddings.word_embeddings = None
    model.Qformer.bert.embeddings.position_embeddings = None
    for layer in model.Qformer.bert.encoder.layer:
        layer.output = layer.intermediate = None


def parameters(model):
    """Every parameter once under its first name (tied ones are not repeated)."""
    return dict(model.named_parameters())


def features(seed, batch):
    """(batch, 7, 22) image features."""
    return torch.randn(batch, IMAGE_TOKENS, CONFIG["encoder_width"], generator=torch.Generator().manual_seed(seed))


def texts(seed, lengths):
    """Lists of word ids in 3..97 of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, CONFIG["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def header():
    """Metadata all LAVIS goldens carry."""
    return dict(versions=versions("torch", "transformers"), lavis_commit=COMMIT, config=CONFIG, seed=SEED,
                ids=dict(pad=PAD, cls=CLS, sep=SEP, dec=DEC))


if __name__ == "__main__":
    args = arguments(__doc__, lavis="root of a LAVIS checkout at " + COMMIT)
    weights = parameters(stage1_model(args.lavis))
    write_tensors(args, "blip2_tiny", weights, **header())
