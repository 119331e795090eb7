"""Tools that models use: the sandbox that their code runs in."""
