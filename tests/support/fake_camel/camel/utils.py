class BaseTokenCounter:
    pass
