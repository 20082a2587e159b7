from hypothesis import HealthCheck, settings

# Random tests are the same every time; `make test-all` tries more examples.
settings.register_profile(
    "few",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("many", settings.get_profile("few"), max_examples=500)
settings.load_profile("few")
