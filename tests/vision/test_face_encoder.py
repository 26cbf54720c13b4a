import shutil

import numpy as np
import onnxruntime
import pytest
import torch

from difflora_core.errors import ConfigError, EncoderError, ImageError
from difflora_core.vision.face_encoder import InsightFaceEncoder
from difflora_core.vision.face_providers import ProviderReport, choose_providers


def centre(face):
    x1, y1, x2, y2 = face.box.tolist()
    return (x1 + x2) / 2, (y1 + y2) / 2


def test_a_face_is_found_where_it_is(face_encoder, photo):
    (face,) = face_encoder.detect(photo((38, 22, 52)))
    assert np.allclose(centre(face), (64, 48), atol=1)
    assert face.box.shape == (4,)
    assert face.keypoints.shape == (5, 2)
    assert face.embedding.shape == (128,) == (face_encoder.embedding_dim,)
    assert 0.5 < face.score <= 1
    assert face.area == pytest.approx(52**2, rel=0.01)
    # Eyes above the nose, left before right.
    assert face.keypoints[0, 0] < face.keypoints[1, 0]
    assert face.keypoints[0, 1] < face.keypoints[2, 1]


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (300, 200), (1200, 900)])
def test_coordinates_are_those_of_the_picture(face_encoder, photo, size):
    height, width = size
    scale = max(size) / 128
    side = round(52 * scale)
    left, top = round(32 * scale) - side // 2, round(32 * scale) - side // 2
    picture = photo((max(left, 0), max(top, 0), side), height=height, width=width)
    faces = face_encoder.detect(picture)
    assert len(faces) == 1
    assert np.allclose(centre(faces[0]), (32 * scale, 32 * scale), atol=2 * scale)


def test_colour_order_reaches_the_network(face_encoder, photo):
    """The markers are green: exchanging red and blue must not matter, red faces must not count."""
    red = photo((38, 22, 52))[..., [1, 0, 2]]
    assert face_encoder.detect(red) == []


def test_8k_picture_is_scaled_down(face_encoder):
    picture = torch.full((4320, 7680, 3), 0.4)
    picture[1200:4320, 2000:5120] = torch.tensor([0.0, 1.0, 0.0])
    (face,) = face_encoder.detect(picture)
    assert np.allclose(centre(face), (3560, 2760), atol=500)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 3), (8, 8), (9, 3000)])
def test_tiny_and_thin_pictures_have_no_face(face_encoder, size):
    assert face_encoder.detect(torch.rand(*size, 1).expand(-1, -1, 3)) == []


def test_grey_and_alpha_pictures(face_encoder, photo):
    assert face_encoder.detect(photo((38, 22, 52)).mean(-1)) == []
    opaque = torch.cat([photo((38, 22, 52)), torch.ones(128, 128, 1)], dim=-1)
    assert len(face_encoder.detect(opaque)) == 1


def test_nan_pixels_are_refused(face_encoder, photo):
    picture = photo((38, 22, 52))
    picture[5, 5, 1] = torch.nan
    with pytest.raises(ImageError, match="not numbers"):
        face_encoder.detect(picture)


def test_a_face_that_fills_the_frame_is_found_with_a_border(face_encoder, photo):
    picture = photo((0, 0, 128))
    assert face_encoder.analysis.get((picture * 255).byte().flip(-1).contiguous().numpy()) == []
    (face,) = face_encoder.detect(picture)
    assert np.allclose(centre(face), (64, 64), atol=16)
    assert face.area > 64**2


def test_a_smaller_detector_input_finds_large_faces(face_models, tmp_path, photo):
    shutil.copy(face_models / "free_detector.onnx", tmp_path)
    shutil.copy(face_models / "recogniser.onnx", tmp_path)
    encoder = InsightFaceEncoder(tmp_path)
    picture = photo((102, 86, 52), height=256, width=256)
    detector = encoder.analysis.det_model
    before = detector.input_size, detector.input_sizes
    assert encoder.analysis.get((picture * 255).byte().flip(-1).contiguous().numpy()) == []
    (face,) = encoder.detect(picture)
    assert np.allclose(centre(face), (128, 112), atol=1)
    assert (detector.input_size, detector.input_sizes) == before


def test_the_same_picture_gives_the_same_embedding(face_encoder, photo):
    """Whatever was looked at in between."""
    first, other, again = (
        face_encoder.detect(photo((38, 22, 52), seed=seed))[0].embedding for seed in (0, 1, 0)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_wrapping_a_loaded_analysis(face_encoder, photo):
    wrapped = InsightFaceEncoder.wrap(face_encoder.analysis)
    assert wrapped.embedding_dim == 128
    picture = photo((38, 22, 52))
    assert torch.equal(
        wrapped.detect(picture)[0].embedding, face_encoder.detect(picture)[0].embedding
    )
    assert wrapped.providers.sentence() == "Face analysis runs on cpu."
    with pytest.raises(EncoderError, match="not a face analysis"):
        InsightFaceEncoder.wrap(object())


def test_an_analysis_without_recogniser_is_refused(face_directory, photo):
    from insightface.app import FaceAnalysis

    analysis = FaceAnalysis(
        str(face_directory), allowed_modules=["detection"], providers=["CPUExecutionProvider"]
    )
    analysis.prepare(ctx_id=0, det_size=(128, 128))
    with pytest.raises(EncoderError, match="no face embedding"):
        InsightFaceEncoder.wrap(analysis).detect(photo((38, 22, 52)))


def test_providers_report_what_runs(face_encoder, face_directory, caplog):
    assert face_encoder.providers.used == {
        "detection": "CPUExecutionProvider",
        "recognition": "CPUExecutionProvider",
    }
    assert face_encoder.providers.honoured
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has the CUDA provider")
    encoder = InsightFaceEncoder(face_directory, provider="cuda")
    assert not encoder.providers.honoured
    assert "no cuda provider" in encoder.providers.sentence()
    assert "runs on cpu" in caplog.text


def test_provider_choice():
    available = ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert choose_providers("cuda", available) == list(available)
    assert choose_providers("cpu", available) == ["CPUExecutionProvider"]
    assert choose_providers("coreml", available) == ["CPUExecutionProvider"]
    with pytest.raises(ConfigError, match="Unknown face analysis provider 'gpu'"):
        choose_providers("gpu", available)
    failed = ProviderReport("cuda", available, {"detection": "CPUExecutionProvider"})
    assert "could not start" in failed.sentence()


@pytest.mark.parametrize("size", [0, 100, -32])
def test_detector_size_is_checked(face_directory, size):
    with pytest.raises(ConfigError, match="multiple of 32"):
        InsightFaceEncoder(face_directory, det_size=size)
