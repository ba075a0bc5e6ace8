"""Which functions of a module are called."""


def record_calls(monkeypatch, module, names):
    """Replaces these functions by themselves, recorded: a set that gets the name of each that is called."""
    called = set()

    def recording(name, function):
        def call(*args, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(module, name, recording(name, getattr(module, name)))
    return called
