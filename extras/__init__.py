"""Methods of other papers and files of other projects, which register in the tables of the core.

The core imports none of these modules: a table names the module of a component, and imports it when
a word, such as --auxiliary repa, asks for it. Without this folder, the core works and lacks them.
"""
