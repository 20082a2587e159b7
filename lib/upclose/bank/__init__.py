"""The feature bank: a data set's crops, encoded once; every method, sweep and seed then reads them."""

from upclose.bank.bank import Bank, build, key, open
from upclose.bank.care import ls, rm, verify
from upclose.bank.store import BankError

__all__ = ["Bank", "BankError", "build", "key", "ls", "open", "rm", "verify"]
