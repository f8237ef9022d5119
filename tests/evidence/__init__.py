"""The evidence behind the compatibility rules: what the installed libraries really do, on a device that counts bytes.

A test names the rules and facts that it shows: `@pytest.mark.rule("id")`; they name it in `schema/compatibility.yaml`.
"""
