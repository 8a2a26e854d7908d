"""Why a job hangs, crashes or goes wrong: what its ranks tell, compared by judges."""
