"""The refusals that plugins share."""

import pytest
from torch import nn

from gankit import UsageError, checks
from gankit.testing import tiny_gan


def test_batch_norm_is_refused_where_single_samples_count_and_allowed_by_name() -> None:
    g = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    d = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    gan = tiny_gan(generator=g, discriminator=d)
    with pytest.raises(UsageError, match=r"mine needs .*batch norm at '1'.*--allow batch-norm"):
        checks.need_per_sample_critic(gan, "mine")
    with pytest.raises(UsageError, match=r"mine needs .*generator has batch norm at '1'.*--allow generator-batch-norm"):
        checks.need_per_sample_generator(gan, "mine")
    allowed = tiny_gan(generator=g, discriminator=d, allow=frozenset({"batch-norm", "generator-batch-norm"}))
    for check in (checks.need_per_sample_critic, checks.need_per_sample_generator):
        with pytest.warns(UserWarning, match="batch norm"):
            check(allowed, "mine")
        check(tiny_gan(), "mine")


@pytest.mark.parametrize("loss", ["non_saturating", "saturating", "hinge", "relativistic"])
def test_a_logit_is_a_log_ratio_under_logistic_losses_alone(loss: str) -> None:
    gan = tiny_gan(loss=loss)
    if loss in ("non_saturating", "saturating"):
        checks.need_logistic_loss(gan, "mine")
    else:
        with pytest.raises(UsageError, match=f"'{loss}'.*--loss non_saturating.*--allow mine-loss"):
            checks.need_logistic_loss(gan, "mine")
