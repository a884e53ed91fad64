"""Operations on the registry that robots are served from. They act on the outside world, so none is ever cached."""
