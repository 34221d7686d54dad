"""What errors advise, as it is said in Python and on the command line."""

__all__ = ["BEGIN_AGAIN", "OVERWRITE"]

BEGIN_AGAIN = "start over with resume=False (--no-resume)"
OVERWRITE = "overwrite=True (--overwrite)"
