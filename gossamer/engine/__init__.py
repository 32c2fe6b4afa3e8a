"""Every fast way to evaluate a potential, behind one entrance."""
