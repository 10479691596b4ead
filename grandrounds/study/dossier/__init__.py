"""What an ethics board needs of a run, every line with its file: `grandrounds dossier`.

    record.py        the files of a run directory: their hashes, and values with where they stand
    lines.py         a line, a section, the dossier, and its digest
    trained.py       sections: run, base, data, recipe
    shared.py        sections: approval, what left each site
    protected.py     section: guarantee, masks, audit
    results.py       sections: evaluation, sites, forgetting, personal adapters, checkpoints
    software.py      sections: versions, packages; the SBOM
    guidelines.py    items of TRIPOD-LLM and FUTURE-AI: answered by sections, or left to people
    build.py         all of it
    page.py          the dossier as one HTML page, through templates/
    written.py       writes page and JSON
    verify.py        recomputes a dossier from the files, and tells what differs

A dossier of unchanged files has the same bytes whenever it is written.
"""
