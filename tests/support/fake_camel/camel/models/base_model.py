class BaseModelBackend:
    pass
