"""``python -m nirvana_deploy`` is the command ``nirvana-deploy``."""

from nirvana_deploy.cli.main import main

main()
