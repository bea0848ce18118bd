rule all:
    input:
        [],
