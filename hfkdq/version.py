# SPDX-License-Identifier: Apache-2.0
"""The version, in this place alone: packaging, cards and reports read it here."""

__version__ = "0.1.0"
