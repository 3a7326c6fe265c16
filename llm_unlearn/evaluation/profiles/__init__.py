"""Conventions of scoring: ours, and those of the published code, for numbers that can be compared."""

from llm_unlearn.evaluation.profiles.default import Profile
from llm_unlearn.evaluation.profiles.muse import MuseProfile
from llm_unlearn.evaluation.profiles.open_unlearning import OpenUnlearningProfile

PROFILES: dict[str, Profile] = {
    profile.name: profile for profile in (Profile(), MuseProfile(), OpenUnlearningProfile())
}

__all__ = ["PROFILES", "Profile"]
