# SPDX-License-Identifier: Apache-2.0
"""The one exception that a user, rather than a programmer, is meant to read."""


class UserError(ValueError):
    """A mistake that the user can cure; the message is one line and names the cure.

    The command line prints the message without a stack trace and exits with code 2.
    """
