"""Runs code that nobody has read: the answer in one process, its tests in another, both confined.

The process of the tests never runs the answer's code. It asks the other process to call a function, and takes plain data
back by value; all other objects stay where they are (`Remote`). So an answer that ends its process, patches Python,
prints results, or returns an object that equals everything passes no test by it.

On Linux with Landlock and seccomp, which need no privileges, both processes read Python's own files alone, write their
temporary folder alone, start no process, send no signal, open no connection, and read no other process. Memory, processor
time, wall time, and the sizes and number of open files are limited everywhere; environment and input are never passed on.

What an answer can still do:

- return the right value by rote, where a prompt shows the tests;
- claim that it contains what a test looks for (`assert 3 in f()`), where it returns an object with `__contains__`, or
  that it is true (`assert f()`);
- change an argument that a test compares with later, as in one process;
- replace a function that the tests use and only the answer imports (`from math import isclose`); modules are the tests'
  own, and so are builtins where the tests use another name of the answer;
- use its share of time and memory, and fill its folder with files of at most 16 MiB, until its time is over.

Tests that hand functions of theirs to the answer's code are not checked and do not count. An exception of a class that
the answer defines cannot be caught by its class.
"""
