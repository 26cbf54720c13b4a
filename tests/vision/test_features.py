import itertools
from dataclasses import replace

import pytest
import torch

from difflora_core.errors import ConfigError, EncoderError, ImageError, NoFaceError
from difflora_core.vision.face_choice import FaceOptions, choose_face, listed
from difflora_core.vision.features import FeatureSizes, ImageFeatures, extract_features
from difflora_core.vision.keypoint_picture import keypoint_picture
from difflora_core.vision.preprocess import resize_square

BIG, SMALL = (54, 38, 52), (12, 52, 24)  # left, top, side; centres on the detector's grid


@pytest.fixture
def two_faces(photo):
    return photo(BIG, SMALL)


@pytest.fixture
def empty(photo):
    return photo()


def test_one_photo(face_encoder, image_encoder, photo):
    picture = photo(BIG)
    result = extract_features(picture[None], face_encoder, image_encoder)
    features = result.features
    assert features.sizes == FeatureSizes(face=128, image=24, tokens=17, token_dim=32)
    assert features.face_found.tolist() == [True]
    assert features.face.norm(dim=1).item() == pytest.approx(1)
    assert result.photos == (0,)
    assert result.notes == ()
    assert result.crops.shape == (1, 32, 32, 3)
    assert result.aligned.shape == (1, 112, 112, 3)
    assert result.boxes[0].tolist() == pytest.approx([54, 38, 106, 90], abs=0.5)
    assert result.keypoints.shape == (1, 5, 2)
    assert result.face_masks[0].shape == (128, 128)
    assert result.face_masks[0].sum() == pytest.approx(52**2, rel=0.1)
    # The crop is what CLIP saw, and the face fills 1 / 2.2 of it.
    assert torch.equal(image_encoder.encode(result.crops)[0], features.image)
    green = (result.crops[0, ..., 1] - result.crops[0, ..., 0] > 0.5).float().sum()
    assert green.item() == pytest.approx((32 / 2.2) ** 2, rel=0.25)
    # The aligned face is what the recogniser saw.
    recogniser = face_encoder.analysis.models["recognition"]
    seen = (result.aligned[0] * 255).round().byte().flip(-1).numpy()
    again = torch.nn.functional.normalize(torch.tensor(recogniser.get_feat(seen)[0]), dim=0)
    torch.testing.assert_close(again, features.face[0], atol=0.02, rtol=0)


def test_the_order_of_photos_changes_only_the_order_of_rows(face_encoder, image_encoder, photo):
    pictures = [photo((22 + 16 * i, 38, 52), height=128 - 8 * i, seed=i) for i in range(3)]
    straight = extract_features(pictures, face_encoder, image_encoder).features
    for order in itertools.permutations(range(3)):
        shuffled = extract_features([pictures[i] for i in order], face_encoder, image_encoder)
        for name in ("face", "face_found", "image", "image_tokens"):
            expected = getattr(straight.select(order), name)
            assert torch.equal(getattr(shuffled.features, name), expected)


def test_a_photo_is_described_alike_alone_and_in_company(face_encoder, image_encoder, photo):
    pictures = torch.stack([photo(BIG, seed=i) for i in range(3)])
    together = extract_features(pictures, face_encoder, image_encoder).features
    alone = extract_features(pictures[1:2], face_encoder, image_encoder).features
    assert torch.equal(together.image_tokens[1:2], alone.image_tokens)
    assert torch.equal(together.face[1:2], alone.face)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (FaceOptions(), BIG),
        (FaceOptions(index=1), SMALL),
        (FaceOptions(order="left_to_right"), SMALL),
        (FaceOptions(order="left_to_right", index=1), BIG),
    ],
)
def test_face_choice(face_encoder, image_encoder, two_faces, options, expected):
    result = extract_features([two_faces], face_encoder, image_encoder, options)
    assert result.boxes[0, 0].item() == pytest.approx(expected[0], abs=4)


@pytest.mark.parametrize(
    ("order", "expected"), [("largest", [BIG, SMALL]), ("left_to_right", [SMALL, BIG])]
)
def test_every_face_is_a_row(face_encoder, image_encoder, photo, two_faces, order, expected):
    pictures = [photo(BIG), two_faces, photo()]
    options = FaceOptions(order=order, on_missing="image_only", every=True)
    result = extract_features(pictures, face_encoder, image_encoder, options)
    assert result.photos == (0, 1, 1, 2)
    assert result.features.face_found.tolist() == [True, True, True, False]
    assert result.boxes[1:3, 0].tolist() == pytest.approx([box[0] for box in expected], abs=4)
    for row in (1, 2):  # as if it were the one that is chosen
        alone = FaceOptions(order=order, index=row - 1)
        chosen = extract_features([two_faces], face_encoder, image_encoder, alone)
        assert torch.equal(chosen.crops[0], result.crops[row])
        assert torch.equal(chosen.features.face[0], result.features.face[row])
    points = result.keypoint_pictures()
    assert [picture.shape for picture in points] == [(128, 128, 3)] * 3
    both = [keypoint_picture(result.keypoints[[row]], 128, 128) for row in (1, 2)]
    assert torch.allclose(points[1], both[0] + both[1], atol=1e-6)  # they do not touch
    assert not points[2].any()


def test_a_photo_that_does_not_count_may_lack_a_face(face_encoder, image_encoder, two_faces):
    photos, strict = [torch.full((64, 64, 3), 0.4), two_faces], FaceOptions(on_missing="error")
    with pytest.raises(NoFaceError, match="Picture 1 shows no face"):
        extract_features(photos, face_encoder, image_encoder, strict, spare=[1])
    result = extract_features(photos, face_encoder, image_encoder, strict, spare=[0])
    assert (result.photos, result.missing) == ((1,), (1,))
    with pytest.raises(NoFaceError, match="Picture 1 shows no face"):
        extract_features(photos[:1], face_encoder, image_encoder, strict, spare=[0])


def test_mask_chooses_among_every_face(face_encoder, image_encoder, two_faces):
    mask = torch.zeros(128, 128)
    mask[56:72, 14:32] = 1
    options = FaceOptions(every=True)
    result = extract_features([two_faces], face_encoder, image_encoder, options, mask)
    assert result.photos == (0,)
    assert result.boxes[0, 0].item() == pytest.approx(SMALL[0], abs=4)


def test_mask_wins_over_order(face_encoder, image_encoder, two_faces):
    mask = torch.zeros(1, 64, 64)  # another size than the picture's
    mask[:, 28:36, 7:16] = 1
    result = extract_features([two_faces], face_encoder, image_encoder, masks=mask)
    assert result.boxes[0, 0].item() == pytest.approx(SMALL[0], abs=4)
    blank = extract_features([two_faces], face_encoder, image_encoder, masks=torch.zeros(64, 64))
    assert blank.boxes[0, 0].item() == pytest.approx(BIG[0], abs=4)
    mask = torch.zeros(128, 128)
    mask[:8] = 1
    with pytest.raises(NoFaceError, match=r"none of them under the mask\. Paint"):
        extract_features([two_faces], face_encoder, image_encoder, masks=mask)
    with pytest.raises(ImageError, match="2 face masks for 1 picture"):
        extract_features([two_faces], face_encoder, image_encoder, masks=[mask, mask])
    for broken in (torch.zeros(1, 0, 128), mask / mask):  # no pixels; 0 / 0
        with pytest.raises(ImageError, match="Mask 1 has no pixels, or values that are no"):
            extract_features([two_faces], face_encoder, image_encoder, masks=broken)


def test_missing_face_is_an_error_by_default(face_encoder, image_encoder, photo, empty):
    with pytest.raises(NoFaceError, match="Picture 2 shows no face") as caught:
        extract_features([photo(BIG), empty], face_encoder, image_encoder)
    assert "Picture 1" not in str(caught.value)
    with pytest.raises(NoFaceError, match=r"no face number 4 .* Choose a smaller face_index"):
        extract_features([photo(BIG)], face_encoder, image_encoder, FaceOptions(index=4))


def test_skip_drops_the_photo_and_says_so(face_encoder, image_encoder, photo, empty):
    options = FaceOptions(on_missing="skip")
    result = extract_features([empty, photo(BIG)], face_encoder, image_encoder, options)
    assert result.photos == (1,)
    assert len(result.features) == 1
    assert "Picture 1" in result.notes[0]
    with pytest.raises(NoFaceError, match="No photo is left"):
        extract_features([empty, empty], face_encoder, image_encoder, options)


def test_image_only_keeps_the_photo_without_a_face(face_encoder, image_encoder, photo, empty):
    options = FaceOptions(on_missing="image_only")
    result = extract_features([empty, photo(BIG)], face_encoder, image_encoder, options)
    assert result.features.face_found.tolist() == [False, True]
    assert torch.equal(result.features.face[0], torch.zeros(128))
    assert torch.equal(result.crops[0], resize_square(empty, 32))
    assert torch.isnan(result.boxes[0]).all()
    assert result.face_masks[0].sum() == 0
    assert result.aligned[0].sum() == 0
    assert result.scores[0] == 0


def test_image_region_picture(face_encoder, image_encoder, photo):
    picture = photo(BIG)
    options = FaceOptions(image_region="picture")
    result = extract_features([picture], face_encoder, image_encoder, options)
    assert torch.equal(result.features.image, image_encoder.encode(picture[None])[0])
    assert result.features.face_found.all()


@pytest.mark.parametrize("picture", [torch.rand(1, 1, 3), torch.rand(40, 50), torch.rand(9, 9, 4)])
def test_strange_pictures_have_image_features(face_encoder, image_encoder, picture):
    options = FaceOptions(on_missing="image_only")
    result = extract_features([picture], face_encoder, image_encoder, options)
    assert torch.isfinite(result.features.image_tokens).all()


def test_nan_pixels_name_the_picture(face_encoder, image_encoder, photo):
    bad = photo(BIG)
    bad[0, 0, 0] = torch.nan
    with pytest.raises(ImageError, match="Picture 2"):
        extract_features([photo(BIG), bad], face_encoder, image_encoder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": "biggest"}, {"on_missing": "ignore"}, {"image_region": "face"}, {"index": -1},
        {"region_factor": 0.5}, {"region_factor": float("nan")},
    ],
)  # fmt: skip
def test_options_are_checked(wrong):
    with pytest.raises(ConfigError):
        FaceOptions(**wrong)


def test_choose_face_without_faces():
    assert choose_face([], FaceOptions()) is None
    assert choose_face([], FaceOptions(), torch.ones(4, 4)) is None


def random_features(count, face=8, image=24):
    return ImageFeatures(
        torch.rand(count, face), torch.ones(count, dtype=torch.bool),
        torch.rand(count, image), torch.rand(count, 17, 32),
    )  # fmt: skip


def test_cat_and_select_are_inverse():
    parts = [random_features(2), random_features(1)]
    whole = ImageFeatures.cat(parts)
    assert len(whole) == 3
    assert torch.equal(whole.select(2).image_tokens, parts[1].image_tokens)
    assert torch.equal(whole.select([0, 1]).face, parts[0].face)
    half = whole.to(dtype=torch.float16)
    assert half.face.dtype == torch.float16
    assert half.face_found.dtype == torch.bool
    with pytest.raises(EncoderError, match="no image features"):
        ImageFeatures.cat([])


def test_features_of_other_encoders_are_refused():
    with pytest.raises(EncoderError, match="Wrong CLIP vision"):
        ImageFeatures.cat([random_features(1), random_features(1, image=768)])
    with pytest.raises(EncoderError, match="Wrong face recogniser"):
        ImageFeatures.cat([random_features(1), random_features(1, face=512)])
    trained = FeatureSizes(512, 1024, 257, 1280)
    with pytest.raises(EncoderError, match=r"ViT-bigG/14.*trained with CLIP ViT-H/14"):
        trained.check(FeatureSizes(512, 1280, 257, 1664))
    trained.check(trained)


def test_features_must_fit_together():
    good = random_features(2)
    with pytest.raises(EncoderError, match="do not fit together"):
        ImageFeatures(good.face[:1], good.face_found, good.image, good.image_tokens)
    with pytest.raises(EncoderError, match="true or false"):
        ImageFeatures(good.face, good.face_found.float(), good.image, good.image_tokens)


def test_many_photos_without_a_face_are_one_sentence(face_encoder, image_encoder, photo, empty):
    photos = [*[empty] * 3, photo(BIG), *[empty] * 2]
    options = FaceOptions(on_missing="image_only")
    result = extract_features(photos, face_encoder, image_encoder, options)
    assert result.notes == ("Pictures 1 to 3, 5 and 6 show no face that could be found.",)
    assert result.missing == (1, 2, 3, 5, 6)
    with pytest.raises(NoFaceError, match=r"Pictures 1 to 3, 5 and 6 show no .* to skip or"):
        extract_features(photos, face_encoder, image_encoder)


def test_advice_for_one_photo_works(face_encoder, image_encoder, photo, empty):
    """Skipping the only photo would end in the next error."""
    with pytest.raises(NoFaceError, match="set on_missing_face to image_only") as caught:
        extract_features([empty], face_encoder, image_encoder)
    assert "skip" not in str(caught.value)
    asked = FaceOptions(index=3)
    with pytest.raises(NoFaceError, match=r"shows one face, so .* number 3 \(face_index counts"):
        extract_features([photo(BIG)], face_encoder, image_encoder, asked)


def test_numbers_in_words():
    assert listed([4]) == "4"
    assert listed([1, 2]) == "1 and 2"
    assert listed([1, 3, 4, 5, 9]) == "1, 3 to 5 and 9"


def test_photos_of_two_recognisers_are_not_joined(face_encoder, image_encoder, photo):
    own = extract_features([photo(BIG)], face_encoder, image_encoder).features
    assert own.recogniser == "recogniser.onnx"
    other = replace(own, recogniser="w600k_r50.onnx")
    with pytest.raises(EncoderError, match="different face recognisers"):
        ImageFeatures.cat([own, other])
    assert ImageFeatures.cat([own, replace(own, recogniser="")]).recogniser == own.recogniser
