"""How many examples a property is tried on; the profiles themselves stand in ``tests/conftest.py``."""

from hypothesis import settings


def examples(few: int) -> settings:
    """Settings of a property: ``few`` examples, and twenty times as many in the long form."""
    profile = settings.get_profile(settings.get_current_profile_name())
    return settings(max_examples=few * profile.max_examples // 100)
