from hypothesis import settings

# The same examples each time: a test of the suite that fails must fail again when it is looked at.
settings.register_profile("bench", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("bench")
