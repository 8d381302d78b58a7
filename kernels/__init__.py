"""Operations of the engine and the trainer: each a plain-torch reference beside its compiled form."""
