"""Installed as li_compile.passes; importing this folder by its bare name would make a second copy of it."""

if __name__ == "passes":
    raise ImportError("import li_compile.passes instead")
