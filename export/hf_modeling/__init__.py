"""The code that folders of MiniCPM, InternLM2 and MiMo carry: `export/hf_code.py` writes it under their names."""
