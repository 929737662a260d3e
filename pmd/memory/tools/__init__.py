"""Tools for memory stores: check, compare generations, export and import, report."""
