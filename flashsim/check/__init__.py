"""Is a schedule right? Drawn examples run functionally, and mutants of its text show that a run would notice."""
