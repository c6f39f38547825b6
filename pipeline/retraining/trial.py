"""Tries whether a predictor loads and encodes one image, which is what it will be used for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from air.errors import AirError
from pipeline.bulk.encode import EncodeConfig, encode_image, measure, prepare_encoder
from pipeline.errors import Rejected
from pipeline.inputs.pictures import find_pictures
from pipeline.predictors import PredictorReference

logger = logging.getLogger(__name__)


def encode_one(inputs: Sequence[str], reference: PredictorReference) -> str:
    """Encodes and decodes the first picture that can be read.

    Args:
        inputs: Images, as for `air evaluate`.
        reference: The predictor.

    Returns:
        Why the predictor could not do so; empty if it could, or if there is no such picture.
    """
    config = EncodeConfig.model_validate({"steps": 0, "stored_steps": 0}).settled(reference)
    for picture in find_pictures(inputs):
        try:
            _, rgb = picture.read()
        except Rejected:
            continue
        try:
            prepare_encoder(reference, logger.info)
            measure(encode_image(rgb, config, reference), rgb)
        except AirError as error:
            return f"{picture.source}: {error}"
        return ""
    return ""
