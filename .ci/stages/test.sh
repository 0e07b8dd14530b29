# The README's command for the tests: the whole suite, also the slow tests, with long runs of hypothesis.
copy_source src
command=$(readme_command src/README.md test)
HYPOTHESIS_PROFILE=ci suite src env -u PYTHONSAFEPATH bash -euo pipefail -c "$command"
figures "$passed"
